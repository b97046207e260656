"""The PyTorch references of the kernels are the definitions of the paper, and the dispatch says where it goes."""

import pytest
import torch
import torch.nn.functional as F

from kernels import tpa
from kernels.tpa import dispatch
from tests.kernels.tpa_cases import close, decoded, factor_pairs, materialised, softmax_attention


def test_a_contraction_is_the_mean_of_outer_products():
    a, b = factor_pairs(7, heads=5, dims=(6,), ranks=(3,))
    torch.testing.assert_close(tpa.contract(a, b), materialised(a, b), rtol=0, atol=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
def test_turning_the_token_factors_turns_every_head(sign):
    a, b = factor_pairs(7, heads=5, dims=(6,), ranks=(3,))
    cos, sin = tpa.rotary_table(64, 6, sign=sign)
    positions = torch.tensor([3, 0, 63, 5, 5, 1, 2])
    angles = sign * positions[:, None].double() * 10_000.0 ** -(torch.arange(3) / 3.0).double()
    turn = torch.polar(torch.ones_like(angles), angles)
    x = materialised(a, b)
    turned = torch.complex(x[..., :3], x[..., 3:]) * turn[:, None]
    close(tpa.contract(a, tpa.rotate(b, cos, sin, positions)), torch.cat([turned.real, turned.imag], -1), torch.float32)


def test_one_projection_holds_all_factors_side_by_side():
    pairs = factor_pairs(2, 4, heads=5, dims=(6, 6, 4), ranks=(3, 2, 1))
    cos, sin = tpa.rotary_table(16, 6)
    positions = torch.arange(4).expand(2, 4)
    row = torch.cat([x.flatten(2) for x in pairs], -1)
    q, k, v = tpa.qkv(row, cos, sin, positions, (3, 2, 1), 5, (6, 6, 4))
    close(q, tpa.contract(pairs[0], tpa.rotate(pairs[1], cos, sin, positions)))
    close(k, tpa.contract(pairs[2], tpa.rotate(pairs[3], cos, sin, positions)))
    close(v, tpa.contract(*pairs[4:]))


@pytest.mark.parametrize("new", [1, 3])
def test_decoding_is_attention_over_each_rows_own_tokens(new):
    lengths = torch.tensor([53, new, 20])
    q, cache = torch.randn(3, new, 5, 6).double(), factor_pairs(3, 60, heads=5, dims=(6, 4), ranks=(2, 3))
    close(tpa.decode(q, *cache, lengths), decoded(q, *cache, lengths))


def test_an_empty_row_decodes_to_zeros_whatever_lies_in_the_cache():
    q, cache = torch.randn(2, 1, 5, 6), factor_pairs(2, 9, heads=5, dims=(6, 4), ranks=(2, 3), dtype=torch.float32)
    lengths = torch.tensor([0, 4])
    for x in cache:
        x[0], x[1, 4:] = torch.nan, torch.nan
    out = tpa.decode(q, *cache, lengths)
    assert (out[0] == 0).all()
    close(out[1:], decoded(q[1:], *(x[1:] for x in cache), lengths[1:]))


def test_a_table_of_pages_stands_for_one_piece():
    lengths, pages = torch.tensor([11, 3]), torch.tensor([[4, 0, 2], [1, 3, 3]])
    q, pool = torch.randn(2, 1, 5, 6).double(), factor_pairs(5, 4, heads=5, dims=(6, 4), ranks=(2, 3))
    pieces = [torch.stack([torch.cat([x[page] for page in row]) for row in pages]) for x in pool]
    close(tpa.decode(q, *pool, lengths, pages), decoded(q, *pieces, lengths))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_constant_head_factors_decode_as_grouped_queries(groups):
    q, k, v = (
        torch.randn(2, 1, 4, 6).double(),
        torch.randn(2, 9, groups, 6).double(),
        torch.randn(2, 9, groups, 6).double(),
    )
    a = groups * torch.eye(groups).repeat_interleave(4 // groups, 1).double().expand(2, 9, groups, 4)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    close(tpa.decode(q, a, k, a, v, torch.tensor([9, 9])), wanted.transpose(1, 2))


def test_attention_is_the_definition():
    six = factor_pairs(2, 9, heads=5, dims=(6, 6, 4), ranks=(3, 2, 1))
    for causal in (True, False):
        found = tpa.attention(*six, causal=causal)
        for row in range(2):
            q, k, v = (materialised(a[row], b[row]) for a, b in zip(six[::2], six[1::2]))
            close(found[row], softmax_attention(q, k, v, causal))


def test_prefill_in_pieces_is_prefill_at_once():
    six = factor_pairs(2, 9, heads=5, dims=(6, 6, 4), ranks=(3, 2, 1))
    pieces = [
        tpa.attention(*(x[:, a:b] for x in six[:2]), *(x[:, :b] for x in six[2:])) for a, b in ((0, 1), (1, 7), (7, 9))
    ]
    close(torch.cat(pieces, 1), tpa.attention(*six))
    q = tpa.contract(six[0][:, 8:], six[1][:, 8:])
    close(tpa.decode(q, *six[2:], torch.tensor([9, 9])), tpa.attention(*six)[:, 8:])


def test_rows_of_different_lengths_are_each_by_itself_and_empty_ones_zero():
    six = [x.requires_grad_() for x in factor_pairs(3, 9, heads=5, dims=(6, 6, 4), ranks=(3, 2, 1))]
    lengths = torch.tensor([9, 4, 0])
    found = tpa.attention(*six, query_lengths=lengths, key_lengths=lengths)
    close(found[1, :4], tpa.attention(*(x[1:2, :4] for x in six))[0])
    assert (found[1, 4:] == 0).all()
    assert (found[2] == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.square().sum(), six))


def test_packed_attention_is_attention_within_each_sequence():
    six = factor_pairs(9, heads=5, dims=(6, 6, 4), ranks=(3, 2, 1))
    starts = torch.tensor([0, 4, 4, 7])
    found = tpa.packed_attention(*six, starts, starts, 4, 4)
    for a, b in ((0, 4), (4, 7)):
        close(found[a:b], tpa.attention(*(x[None, a:b] for x in six))[0])
    assert (found[7:] == 0).all()


def test_a_mask_decides_alone():
    six = factor_pairs(1, 6, heads=5, dims=(6, 6, 4), ranks=(3, 2, 1))
    documents = torch.tensor([0, 0, 0, 1, 1, 1])
    mask = (documents[:, None] == documents).tril()[None, None]
    starts = torch.tensor([0, 3, 6])
    packed = tpa.packed_attention(*(x[0] for x in six), starts, starts, 3, 3)
    close(tpa.attention(*six, mask=mask)[0], packed)
    with pytest.raises(ValueError, match="give lengths or a mask, not both"):
        tpa.attention(*six, mask=mask, key_lengths=torch.tensor([6]))


def test_a_forced_kernel_is_refused_by_name_where_it_cannot_run():
    a, b = factor_pairs(7, heads=5, dims=(6,), ranks=(3,))
    reason = "not on a GPU" if dispatch.HAS_TRITON else "not installed"
    with pytest.raises(ValueError, match=f"kernel of contract cannot run: .*{reason}.*reference"):
        tpa.contract(a, b, impl="triton")
    with pytest.raises(ValueError, match="impl=cuda is none of auto, triton, torch"):
        dispatch.takes_kernel("contract", "cuda", None, a)


def test_the_distribution_of_the_same_name_is_named_where_it_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.18.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"Hugging Face for get_kernel, .* `pip uninstall kernels`"):
        from kernels import get_kernel  # noqa: F401


def test_bad_input_is_refused_by_name():
    a, b = factor_pairs(7, heads=5, dims=(6,), ranks=(3,))
    cos, sin = tpa.rotary_table(16, 6)
    with pytest.raises(ValueError, match=r"contract: b is torch.float32 on cpu, but a is torch.float64"):
        tpa.contract(a, b.float())
    with pytest.raises(ValueError, match="rank=0 is no sum"):
        tpa.contract(a[:, :0], b[:, :0])
    with pytest.raises(ValueError, match="rotate: rank=0 is no sum"):
        tpa.rotate(b[:, :0], cos, sin, torch.arange(7))
    with pytest.raises(ValueError, match="qkv: rank=0 is no sum"):
        tpa.qkv(torch.randn(7, 22), cos, sin, torch.arange(7), (1, 0, 1), 5, (6, 6, 6))
    six = factor_pairs(1, 7, heads=5, dims=(6, 6, 4), ranks=(3, 2, 1))
    with pytest.raises(ValueError, match="attention: rank=0 is no sum"):
        tpa.attention(*six[:4], six[4][:, :, :0], six[5][:, :, :0])
    with pytest.raises(ValueError, match=r"attention: b_v is torch.float16 on cpu, but a_q is torch.float64"):
        tpa.attention(*six[:5], six[5].half())
    with pytest.raises(ValueError, match="a table of 3 angles turns dim=6, not dim=7"):
        tpa.rotate(torch.randn(7, 3, 7), cos, sin, torch.arange(7))
    with pytest.raises(ValueError, match="dim=5 is odd"):
        tpa.rotary_table(16, 5)
    with pytest.raises(ValueError, match="position 16 is outside the table of 16"):
        tpa.rotate(b, cos, sin, torch.arange(10, 17))
    with pytest.raises(ValueError, match="a table of 3 angles turns dim=6, not dim=8"):
        tpa.rotate(torch.randn(7, 3, 8), cos, sin, torch.arange(7))
    with pytest.raises(ValueError, match="make rows of 44, not of 43"):
        tpa.qkv(torch.randn(7, 43), cos, sin, torch.arange(7), (2, 1, 1), 5, (6, 6, 6))
    cache = factor_pairs(2, 9, heads=5, dims=(6, 4), ranks=(2, 3))
    q, lengths = torch.randn(2, 1, 5, 6).double(), torch.tensor([9, 4])
    with pytest.raises(ValueError, match=r"lengths=\[10, 4\] do not fit a cache of 9 tokens"):
        tpa.decode(q, *cache, lengths + torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="decode: rank=0 is no sum"):
        tpa.decode(q, *(x[:, :, :0] for x in cache), lengths)
    with pytest.raises(ValueError, match=r"decode: a_k is torch.float64 on cpu, but q is torch.float32"):
        tpa.decode(q.float(), *cache, lengths)
    with pytest.raises(ValueError, match="a_k has factors of 5 heads, but q has heads=6"):
        tpa.decode(torch.randn(2, 1, 6, 6).double(), *cache, lengths)
    with pytest.raises(ValueError, match="the cache has 2 rows, but q has 1"):
        tpa.decode(q[:1], *cache, lengths[:1])
