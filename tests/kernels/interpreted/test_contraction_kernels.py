"""Rotation, contraction and their fusion, forward and backward, against the references in float64."""

import dataclasses

import pytest
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import interpreter_builder

from kernels import tpa
from kernels.tpa.contraction import configs
from tests.kernels.tpa_cases import close, factor_pairs

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def gradients(outputs, inputs, seed: int = 1) -> list[torch.Tensor]:
    """Gradients of the inputs for fixed random gradients of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    return list(torch.autograd.grad(outputs, inputs, given))


def doubled(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rank"), [(1, 8, 1), (5, 6, 3), (47, 64, 6)])
def test_contraction_and_its_gradients(dtype, heads, dim, rank):
    given = [x.requires_grad_() for x in factor_pairs(2, 3, heads=heads, dims=(dim,), ranks=(rank,), dtype=dtype)]
    exact = doubled(given)
    found, wanted = tpa.contract(*given, impl="triton"), tpa.contract(*exact, impl="torch")
    close(found, wanted)
    for x, y in zip(gradients([found], given), gradients([wanted], exact)):
        close(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_its_gradient(dtype):
    (_, b), positions = factor_pairs(2, 5, heads=1, dims=(12,), ranks=(3,), dtype=dtype), torch.randint(0, 40, (2, 5))
    b, (cos, sin) = b.requires_grad_(), tpa.rotary_table(40, 12)
    (exact,) = doubled([b])
    found, wanted = (tpa.rotate(x, cos, sin, positions, impl=i) for x, i in ((b, "triton"), (exact, "torch")))
    close(found, wanted)
    close(gradients([found], [b])[0], gradients([wanted], [exact])[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_projection_and_its_gradient(dtype):
    ranks, heads, dims = (6, 2, 3), 7, (12, 12, 10)
    row = torch.randn(2, 5, sum(r * (heads + d) for r, d in zip(ranks, dims))).to(dtype).requires_grad_()
    shared = (*tpa.rotary_table(40, 12, sign=-1), torch.randint(0, 40, (2, 5)), ranks, heads, dims)
    (exact,) = doubled([row])
    found, wanted = tpa.qkv(row, *shared, impl="triton"), tpa.qkv(exact, *shared, impl="torch")
    for x, y in zip(found, wanted):
        close(x, y, dtype)
    close(gradients(found, [row])[0], gradients(wanted, [exact])[0])


def test_factors_that_are_views_of_a_projection_or_constant():
    row = torch.randn(5, 2 * 3 + 2 * 8 + 4)
    a, b = row[:, 1:7].unflatten(-1, (2, 3)), row[:, 9:25].unflatten(-1, (2, 8))
    close(tpa.contract(a, b, impl="triton"), tpa.contract(a, b, impl="torch"))
    constant = torch.randn(2, 3).expand(5, 2, 3)
    close(tpa.contract(constant, b, impl="triton"), tpa.contract(constant, b, impl="torch"))
    strided = torch.randn(5, 2, 6)[..., ::2]
    close(tpa.contract(strided, b, impl="triton"), tpa.contract(strided, b, impl="torch"))


def test_the_backward_of_a_contraction_is_its_transpose():
    a, b = factor_pairs(4, heads=5, dims=(6,), ranks=(3,))
    da, db = factor_pairs(4, heads=5, dims=(6,), ranks=(3,))
    dx = torch.randn(4, 5, 6).double()
    moved = tpa.contract(da, b, impl="triton") + tpa.contract(a, db, impl="triton")
    back_a, back_b = torch.ops.tessera.tpa_contract_backward(dx, a, b)
    torch.testing.assert_close((dx * moved).sum(), (back_a * da).sum() + (back_b * db).sum())


@pytest.mark.parametrize("position", [4, -1])
def test_a_position_past_the_table_is_refused_in_the_kernel_too(position, monkeypatch):
    """On a GPU nobody looks at positions before. The interpreter leaves assertions out, and then it is NaN."""
    b, (cos, sin), positions = torch.randn(2, 1, 8), tpa.rotary_table(4, 8), torch.tensor([3, position])
    turned = torch.ops.tessera.tpa_rotate(b, cos, sin, positions, False)
    assert turned[0].isfinite().all()
    assert turned[1].isnan().all()
    asserting = dataclasses.replace(interpreter_builder.options, **configs.ASSERTING)
    monkeypatch.setattr(interpreter_builder, "options", asserting)
    with pytest.raises(InterpreterError, match="a position is outside the table: make it longer with rotary_table"):
        torch.ops.tessera.tpa_rotate(b, cos, sin, positions, False)
    with pytest.raises(InterpreterError, match="a position is outside the table"):
        torch.ops.tessera.tpa_qkv(torch.randn(2, 33), cos, sin, positions, [1, 1, 1], 3, [8, 8, 8])


def test_no_tokens_are_no_launch():
    assert tpa.contract(torch.randn(0, 2, 3), torch.randn(0, 2, 8), impl="triton").shape == (0, 3, 8)


def test_an_odd_dimension_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kernel of contract cannot run: dim=7 is odd.*reference"):
        tpa.contract(torch.randn(2, 1, 3), torch.randn(2, 1, 7), impl="triton")
