"""Split decoding against the definition in float64: ragged, empty, paged, padded, several new tokens, hot logits."""

import pytest
import torch

from kernels import tpa
from tests.kernels.tpa_cases import TOLERANCE, close, decoded, factor_pairs


def case(lengths, heads=5, dims=(6, 4), ranks=(2, 3), new=1, capacity=60, dtype=torch.float64, size=1.0):
    """Queries, a cache and lengths; what lies behind the lengths is NaN."""
    q = (size * torch.randn(len(lengths), new, heads, dims[0])).to(dtype)
    cache = factor_pairs(len(lengths), capacity, heads=heads, dims=dims, ranks=ranks, dtype=dtype, size=size)
    for x in cache:
        for i, n in enumerate(lengths):
            x[i, n:] = torch.nan
    return q, cache, torch.tensor(lengths)


def split(q, cache, lengths, splits, pages=None):
    """The kernel with a number of splits of one's own."""
    return torch.ops.tessera.tpa_decode(q, *cache, lengths, pages, q.shape[-1] ** -0.5, splits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 3])
def test_decoding_in_each_precision(dtype, new):
    q, cache, lengths = case([53, new, 0, 20], new=new, dtype=dtype)
    for splits in (0, 4):
        close(split(q, cache, lengths, splits), decoded(q, *cache, lengths))


@pytest.mark.parametrize(
    ("heads", "dims", "ranks"),
    [
        (1, (8, 8), (1, 1)),
        (16, (32, 16), (1, 2)),
        (34, (64, 64), (2, 2)),
        (78, (16, 16), (2, 2)),
        (130, (8, 8), (1, 1)),
    ],
)
def test_decoding_at_each_shape(heads, dims, ranks):
    q, cache, lengths = case([129, 128, 15], heads, dims, ranks, capacity=130, dtype=torch.float32)
    close(split(q, cache, lengths, 2), decoded(q, *cache, lengths))


def test_the_number_of_splits_does_not_matter():
    q, cache, lengths = case([300, 17], capacity=320, dtype=torch.float32)
    one = split(q, cache, lengths, 1)
    for splits in (3, 40):
        torch.testing.assert_close(split(q, cache, lengths, splits), one, rtol=0, atol=1e-6)


def test_hot_logits_over_many_splits_stay_finite():
    """1,100 tokens with factors of three times the size: the official reduction subtracts a minimum and gives NaN."""
    q, cache, lengths = case([1100, 700], heads=4, ranks=(1, 1), capacity=1100, dtype=torch.float32, size=3.0)
    logits = 3.0 * max(1.0, (q.norm(dim=-1).max() * cache[1].norm(dim=-1).nan_to_num().max()).item() / 10)
    for splits in (0, 8):
        found, wanted = split(q, cache, lengths, splits), decoded(q, *cache, lengths)
        assert (found - wanted).abs().max() <= TOLERANCE[torch.float32] * logits * wanted.abs().max()


def test_more_new_tokens_than_a_row_has_are_zeros():
    q, cache, lengths = case([2, 0], new=4)
    found = split(q, cache, lengths, 2)
    assert (found[0, :2] == 0).all()
    assert (found[1] == 0).all()
    close(found[:1, 2:], decoded(q[:1, 2:], *(x[:1] for x in cache), lengths[:1]))


def test_pages_stand_for_one_piece():
    q, pool, lengths = case([1, 1, 1, 1, 1], capacity=64)
    pool = factor_pairs(5, 64, heads=5, dims=(6, 4), ranks=(2, 3))
    lengths, pages = torch.tensor([150, 64, 0]), torch.tensor([[4, 0, 2], [1, 3, 3], [9, 9, 9]])
    pieces = [torch.stack([torch.cat([x[min(page, 4)] for page in row]) for row in pages.tolist()]) for x in pool]
    for splits in (0, 3):
        close(split(q[:3], pool, lengths, splits, pages), decoded(q[:3], *pieces, lengths))


def test_padded_and_constant_head_factors_and_a_view_of_a_larger_cache():
    q, cache, lengths = case([40, 33], heads=5, capacity=64, dtype=torch.float32)
    wanted = decoded(q, *cache, lengths)
    a_k, b_k, a_v, b_v = cache
    padded = [torch.nn.functional.pad(a, (0, 3)) for a in (a_k, a_v)]
    close(tpa.decode(q, padded[0], b_k, padded[1], b_v, lengths, impl="triton"), wanted)
    close(tpa.decode(q, *(x[:, :41] for x in cache), lengths, impl="triton"), wanted)
    constant = torch.randn(2, 5).expand(2, 64, 2, 5)
    close(tpa.decode(q, constant, b_k, a_v, b_v, lengths, impl="triton"), decoded(q, constant, b_k, a_v, b_v, lengths))


def test_tables_and_lengths_that_are_views_are_read_as_they_are_meant():
    q, _, _ = case([1, 1], capacity=16)
    pool, pages = factor_pairs(5, 16, heads=5, dims=(6, 4), ranks=(2, 3)), torch.tensor([[4, 9, 0, 9], [1, 9, 3, 9]])
    lengths = torch.tensor([30, 9, 17, 9])
    found = tpa.decode(q, *pool, lengths[::2], pages[:, ::2], impl="triton")
    close(found, tpa.decode(q, *pool, lengths[::2], pages[:, ::2], impl="torch"))


def test_cancelling_value_factors_keep_their_accuracy():
    q, (a_k, b_k, _, _), lengths = case([50], capacity=50, dtype=torch.float32)
    b, d = 100 * torch.randn(1, 50, 1, 4), torch.randn(1, 50, 1, 4)
    a_v, b_v = torch.ones(1, 50, 2, 5), torch.cat([b, d - b], 2)
    error = (tpa.decode(q, a_k, b_k, a_v, b_v, lengths, impl="triton") - decoded(q, a_k, b_k, a_v, b_v, lengths)).abs()
    assert error.max() <= TOLERANCE[torch.float32] * b.abs().max()


def test_two_runs_are_equal_to_the_bit():
    q, cache, lengths = case([300, 17], capacity=320, dtype=torch.float32)
    assert torch.equal(split(q, cache, lengths, 5), split(q, cache, lengths, 5))


def test_what_the_kernel_cannot_take_is_refused_by_name():
    q, cache, lengths = case([20], dtype=torch.float32)
    with pytest.raises(ValueError, match="b_k is not contiguous in its last axis"):
        tpa.decode(
            q, cache[0], cache[1].transpose(2, 3).contiguous().transpose(2, 3), *cache[2:], lengths, impl="triton"
        )
    with pytest.raises(ValueError, match=r"9 new tokens are more than 8 \(use attention\)"):
        tpa.decode(q.expand(1, 9, 5, 6), *cache, lengths, impl="triton")
    with pytest.raises(ValueError, match="it has no gradient"):
        tpa.decode(q.requires_grad_(), *cache, lengths, impl="triton")
