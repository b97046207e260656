"""Tiled attention and its backward against the definition in float64: ragged, packed, empty, misaligned, chunked."""

import itertools

import pytest
import torch

from kernels import tpa
from tests.kernels.tpa_cases import close, factor_pairs, materialised, softmax_attention


def exact(factors, causal=True):
    """The definition for the factors [token, rank, ...] of one sequence, differentiable."""
    q, k, v = (torch.einsum("trh,trd->thd", a, b) / a.shape[1] for a, b in zip(factors[::2], factors[1::2]))
    return softmax_attention(q, k, v, causal)


def leaves(factors, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in factors]


def self_factors(*tokens, heads=3, dims=(8, 8, 6), ranks=(3, 2, 1), dtype=torch.float64, size=1.0):
    return factor_pairs(*tokens, heads=heads, dims=dims, ranks=ranks, dtype=dtype, size=size)


def compared(found, factors, wanted, doubled) -> None:
    """Values and the gradients of the factors agree, for one random gradient of the values."""
    close(found, wanted)
    given = torch.randn(found.shape).to(found.dtype)
    ours = torch.autograd.grad(found, factors, given)
    theirs = torch.autograd.grad(wanted, doubled, given.double())
    for x, y in zip(ours, theirs):
        close(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "causal"),
    [
        (36, 2, True),
        pytest.param(130, 3, True, marks=pytest.mark.slow),
        pytest.param(130, 3, False, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_in_each_precision(dtype, tokens, heads, causal):
    factors = leaves(self_factors(1, tokens, heads=heads, dtype=dtype))
    doubled = leaves(factors, torch.float64)
    wanted = exact([x[0] for x in doubled], causal)[None]
    compared(tpa.attention(*factors, causal=causal, impl="triton"), factors, wanted, doubled)


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_that_fill_no_block(causal):
    """130 keys: the official kernels do not mask those beyond them in the last block."""
    factors = leaves(self_factors(1, 130, heads=1, ranks=(2, 1, 1), dtype=torch.float32))
    doubled = leaves(factors, torch.float64)
    wanted = exact([x[0] for x in doubled], causal)[None]
    compared(tpa.attention(*factors, causal=causal, impl="triton"), factors, wanted, doubled)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_each_by_itself(causal):
    starts = [0, 13, 13, 14, 36]  # the second is empty, and two tokens belong to none
    factors = leaves(self_factors(38, heads=2, dtype=torch.float32))
    doubled = leaves(factors, torch.float64)
    places = (torch.tensor(starts), torch.tensor(starts), 22, 22)
    found = tpa.packed_attention(*factors, *places, causal=causal, impl="triton")
    pieces = [exact([x[a:b] for x in doubled], causal) for a, b in itertools.pairwise(starts)]
    assert (found[36:] == 0).all()
    compared(found, factors, torch.cat([*pieces, 0 * pieces[0][:2]]), doubled)


@pytest.mark.parametrize(("new", "kept"), [(5, 40), (40, 5), pytest.param(70, 133, marks=pytest.mark.slow)])
def test_the_last_query_stands_at_the_last_key(new, kept):
    """Fewer queries: the official mask aligns the first ones. More queries than keys: the first see nothing."""
    queries, keys = (self_factors(1, n, heads=2, dtype=torch.float32) for n in (new, kept))
    factors = leaves([*queries[:2], *keys[2:]])
    doubled = leaves(factors, torch.float64)
    wanted = exact([x[0] for x in doubled])[None]
    compared(tpa.attention(*factors, impl="triton"), factors, wanted, doubled)


def test_rows_of_different_lengths_and_what_lies_behind_them():
    queries, keys = torch.tensor([4, 6, 0, 6]), torch.tensor([20, 6, 3, 0])
    factors = self_factors(4, 6)[:2] + self_factors(4, 20)[2:]
    found = tpa.attention(*factors, query_lengths=queries, key_lengths=keys, impl="triton")
    for row, (n, m) in enumerate(zip(queries.tolist(), keys.tolist())):
        assert (found[row, n:] == 0).all()
        if m:
            close(found[row, :n], exact([x[row, : (n if i < 2 else m)] for i, x in enumerate(factors)]))
    assert (found[3] == 0).all()
    close(found, tpa.attention(*factors, query_lengths=queries, key_lengths=keys, impl="torch"))


def test_lengths_that_are_views_are_read_as_they_are_meant():
    factors = leaves(self_factors(2, 9, heads=1))
    lengths = torch.tensor([4, 0, 9, 0])[::2]
    places = {"query_lengths": lengths, "key_lengths": lengths}
    found, wanted = (tpa.attention(*factors, **places, impl=impl) for impl in ("triton", "torch"))
    close(found, wanted)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), factors) for x in (found, wanted))):
        close(ours, theirs)


def test_hot_logits_stay_finite():
    factors = self_factors(1, 70, heads=1, dtype=torch.float32, size=4.0)
    found, wanted = (
        tpa.attention(*x, impl=i) for x, i in ((factors, "triton"), ([y.double() for y in factors], "torch"))
    )
    assert found.isfinite().all()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_tokens_do_not_see_what_comes_later():
    factors = self_factors(1, 70, heads=1, dtype=torch.float32)
    before = tpa.attention(*factors, impl="triton")
    for x in factors:
        x[:, 40:] = torch.randn_like(x[:, 40:])
    assert torch.equal(tpa.attention(*factors, impl="triton")[:, :40], before[:, :40])


def test_the_log_sums_are_those_of_the_logits():
    factors = self_factors(20)
    q, k = materialised(*factors[:2]), materialised(*factors[2:4])
    lse = torch.ops.tessera.tpa_attention(*factors, *[None] * 4, 20, 20, 1, False, 0.3)[1]
    close(lse * torch.tensor(2.0).double().log(), (0.3 * torch.einsum("qhd,khd->hqk", q, k)).logsumexp(-1))


def test_factors_mixed_by_any_matrix_give_the_same():
    a_q, b_q, a_k, b_k, a_v, b_v = self_factors(1, 20, ranks=(3, 2, 2))
    g = torch.tensor([[2.0, 1.0], [-1.0, 3.0]]).double()
    mixed = g @ a_k, torch.linalg.inv(g).mT @ b_k
    found = tpa.attention(a_q, b_q, *mixed, 64 * a_v, b_v / 64, impl="triton")
    close(found, tpa.attention(a_q, b_q, a_k, b_k, a_v, b_v, impl="triton"))


def test_gradients_are_equal_to_the_bit_in_two_runs():
    def run():
        torch.manual_seed(0)
        factors = leaves(self_factors(1, 20, heads=1, dtype=torch.float32))
        return torch.autograd.grad(tpa.attention(*factors, impl="triton").square().sum(), factors)

    assert all(torch.equal(x, y) for x, y in zip(run(), run()))


def test_views_of_a_projection_and_constant_head_factors():
    heads, dim, ranks = 3, 8, (2, 2, 1)
    row = torch.randn(2, 20, sum(r * (heads + dim) for r in ranks))
    widths = [r * w for r in ranks for w in (heads, dim)]
    factors = [x.unflatten(-1, (-1, w)) for x, w in zip(row.split(widths, -1), 3 * (heads, dim))]
    factors[2] = torch.randn(2, heads, requires_grad=True).expand(2, 20, 2, heads)
    close(tpa.attention(*factors, impl="triton"), tpa.attention(*factors, impl="torch"))


def test_what_the_kernel_cannot_take_is_refused_by_name():
    factors = self_factors(1, 20, dtype=torch.float32)
    with pytest.raises(ValueError, match="no mask but the causal one"):
        tpa.attention(*factors, mask=torch.ones(1, 1, 20, 20, dtype=torch.bool), impl="triton")
    with pytest.raises(ValueError, match=r"no dropout=0\.1"):
        tpa.attention(*factors, dropout=0.1, impl="triton")
    with pytest.raises(ValueError, match="heads of dim=136 are wider than 128"):
        tpa.attention(*self_factors(1, 4, dims=(136, 136, 8)), impl="triton")
