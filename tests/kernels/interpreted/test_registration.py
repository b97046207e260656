"""The ops are registered with PyTorch as it checks them, and compile as part of one graph."""

import pytest
import torch

from kernels import tpa
from tests.kernels.tpa_cases import close, factor_pairs

FACTORS = {"heads": 2, "dims": (4, 4, 4), "ranks": (2, 1, 1), "dtype": torch.float32}


def cases() -> dict:
    """An example call for every op."""
    torch.manual_seed(0)
    six = [x.requires_grad_() for x in factor_pairs(5, **FACTORS)]
    cos, sin = tpa.rotary_table(8, 4)
    positions, row = torch.tensor([3, 1, 2, 7, 0]), torch.randn(5, 24, requires_grad=True)
    out = torch.ops.tessera
    cache = factor_pairs(2, 9, heads=2, dims=(4, 4), ranks=(2, 1), dtype=torch.float32)
    lengths = torch.tensor([9, 4])
    return {
        "contract": (out.tpa_contract, (six[0], six[1])),
        "rotate": (out.tpa_rotate, (six[1], cos, sin, positions, False)),
        "qkv": (out.tpa_qkv, (row, cos, sin, positions, [2, 1, 1], 2, [4, 4, 4])),
        "attention": (out.tpa_attention, (*six, *[None] * 4, 5, 5, 1, True, 0.5)),
        "decode": (out.tpa_decode, (torch.randn(2, 1, 2, 4), *cache, lengths, None, 0.5, 2)),
    }


@pytest.mark.parametrize("op", list(cases()))
def test_pytorch_agrees_with_the_registration(op):
    call, arguments = cases()[op]
    torch.library.opcheck(call.default, arguments)


def layer(row, cos, sin, positions):
    """Everything between two projections: split, rotation, contraction, attention on heads and on factors."""
    parts = row.split([4, 8, 2, 4, 2, 4], -1)
    a_q, b_q, a_k, b_k, a_v, b_v = (x.unflatten(-1, (-1, w)) for x, w in zip(parts, (2, 4) * 3))
    b_q, b_k = (tpa.rotate(b, cos, sin, positions, impl="triton") for b in (b_q, b_k))
    values = tpa.attention(a_q, b_q, a_k, b_k, a_v, b_v, impl="triton")
    q, k, v = tpa.qkv(row, cos, sin, positions, (2, 1, 1), 2, (4, 4, 4), impl="triton")
    return values.sin() + (q * k).sum(-1, keepdim=True) * v + tpa.contract(a_v, b_v, impl="triton")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_layer_is_the_layer(backend, dynamic):
    row, (cos, sin) = torch.randn(2, 5, 24, requires_grad=True), tpa.rotary_table(8, 4)
    positions = torch.arange(5).expand(2, 5)
    found = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)(row, cos, sin, positions)
    wanted = layer(row, cos, sin, positions)
    close(found, wanted)
    close(*(torch.autograd.grad(x.square().sum(), row)[0] for x in (found, wanted)))
