"""Attention is what its formula says, with whatever mask, and from a cache as without one."""

import math

import pytest
import torch

from lightning_modules.language.attention import Cache, MultiHeadAttention, attend, document_mask
from lightning_modules.language.rotary import rotate


def heads(*lengths: int, dim: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 3, dim, generator=generator) for length in lengths]


def written_out(q, k, v, visible, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


@pytest.mark.parametrize("layer", [0, 3])
def test_attention_is_the_written_out_one(layer):
    """As MARS' published runs have it: scores divided by the layer's number too, masked with -inf."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(24, 3, layer, scale_by_layer=True)
    x = torch.randn(2, 10, 24)
    q, k, v = attention.c_attn(x).split(24, -1)
    q, k, v = (part.view(2, 10, 3, 8) for part in (q, k, v))
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    y = attention.c_proj(written_out(q, k, v, causal, 1 / math.sqrt(8) / (layer + 1)))
    torch.testing.assert_close(attention(x, torch.arange(10)[None]), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new", [1, 4, 10])
def test_queries_are_the_last_of_the_keys_tokens(new):
    q, k, v = heads(new, 10, 10)
    visible = torch.ones(10, 10, dtype=torch.bool).tril()[-new:]
    torch.testing.assert_close(attend(q, k, v), written_out(q, k, v, visible, 8**-0.5), rtol=1e-5, atol=1e-5)


def test_a_document_begins_where_counting_restarts():
    mask = document_mask(torch.tensor([[4, 5, 0, 1, 0, 0]]))
    document = torch.tensor([0, 0, 1, 1, 2, 3])
    expected = [[int(document[q] == document[k] and k <= q) for k in range(6)] for q in range(6)]
    assert mask.int()[0, 0].tolist() == expected


def test_rotation_depends_on_the_distance_alone():
    q, k = heads(1, 1)
    score = [(rotate(q, torch.tensor([[t + 5]])) * rotate(k, torch.tensor([[t]]))).sum(-1) for t in (0, 37, 1000)]
    torch.testing.assert_close(score[1], score[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score[2], score[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(rotate(q, torch.tensor([[0]])), q)


def test_rotation_is_multiplication_of_complex_numbers():
    (x,) = heads(6)
    positions = torch.arange(6)[None]
    turned = torch.complex(x[..., :4].contiguous(), x[..., 4:].contiguous())
    angles = torch.arange(6)[:, None, None] * 10_000 ** (-torch.arange(4) / 4)
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, positions), torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("parts", [[10], [1] * 10, [1, 7, 2], [6, 1, 3]])
@pytest.mark.parametrize("options", [{}, {"rotary": True, "qk_norm": True}], ids=["plain", "rotary"])
def test_a_cache_in_any_parts_is_the_whole(parts, options):
    torch.manual_seed(0)
    attention, x, positions = MultiHeadAttention(24, 3, **options), torch.randn(2, 10, 24), torch.arange(10)[None]
    cache = Cache(12)
    pieces = [attention(part, where, None, cache) for part, where in zip(x.split(parts, 1), positions.split(parts, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), attention(x, positions), rtol=1e-5, atol=1e-6)


def test_a_cache_by_head_gives_what_was_kept_and_lies_head_after_head():
    cache, x = Cache(7), torch.randn(2, 5, 3, 4)
    for part in x.split([2, 3], 1):
        kept, doubled = cache.append(part, 2 * part, by_head=True)
    assert torch.equal(kept, x)
    assert torch.equal(doubled, 2 * x)
    assert kept.stride() == (3 * 7 * 4, 4, 7 * 4, 1)
    assert cache.nbytes == 2 * 2 * 7 * 3 * 4 * 4


def test_a_full_cache_is_refused():
    cache = Cache(3)
    cache.append(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="room for 3 tokens cannot keep 4"):
        cache.append(torch.zeros(1, 2, 4))
