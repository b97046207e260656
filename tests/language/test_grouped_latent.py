"""Grouped and latent attention: what their formulas say, and from a cache as without one."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.language.attention import Cache, MultiHeadAttention
from lightning_modules.language.grouped import GroupedQueryAttention
from lightning_modules.language.latent import LatentAttention
from lightning_modules.language.rotary import rotate

POSITIONS = torch.arange(10)[None]
x = torch.randn(2, 10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def grouped(groups: int) -> GroupedQueryAttention:
    torch.manual_seed(0)
    return GroupedQueryAttention(24, 6, 4, groups).double()


def latent() -> LatentAttention:
    torch.manual_seed(0)
    made = LatentAttention(24, 3, 8, (10, 6), 4).double()
    with torch.no_grad():
        for norm in (made.q_norm, made.kv_norm):
            norm.weight.uniform_(0.5, 2)
    return made


def test_a_group_for_every_head_is_multi_head_attention():
    ours, theirs = grouped(6), MultiHeadAttention(24, 6, bias=False, rotary=True).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, POSITIONS), theirs(x, POSITIONS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_neighbouring_heads_share_a_group(groups):
    ours, theirs = grouped(groups), grouped(6)
    q, k, v = ours.c_attn.weight.data.unflatten(0, (-1, 4)).split([6, groups, groups])
    repeated = [part.repeat_interleave(6 // groups, 0) for part in (k, v)]
    theirs.c_attn.weight.data = torch.cat([q, *repeated]).flatten(0, 1)
    theirs.c_proj.weight.data = ours.c_proj.weight.data
    torch.testing.assert_close(ours(x, POSITIONS), theirs(x, POSITIONS), rtol=0, atol=1e-12)


def test_latent_attention_is_the_written_out_one():
    made = latent()
    q = made.q_b(F.rms_norm(made.q_a(x), (10,), made.q_norm.weight, 1e-6)).view(2, 10, 3, 12)
    c, k_r = made.kv_a(x).split([6, 4], -1)
    kv = made.kv_b(F.rms_norm(c, (6,), made.kv_norm.weight, 1e-6)).view(2, 10, 3, 16)
    q = torch.cat([q[..., :8], rotate(q[..., 8:], POSITIONS)], -1)
    k = torch.cat([kv[..., :8], rotate(k_r[:, :, None], POSITIONS).expand(-1, -1, 3, -1)], -1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(12)
    weights = scores.masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    heads = torch.einsum("bhqk,bkhd->bqhd", weights, kv[..., 8:]).flatten(2)
    torch.testing.assert_close(made(x, POSITIONS), made.c_proj(heads), rtol=0, atol=1e-12)


@pytest.mark.parametrize("made", [grouped(1), grouped(2), latent()], ids=["mqa", "gqa", "mla"])
@pytest.mark.parametrize("parts", [[10], [1] * 10, [1, 7, 2], [1, 9]])
def test_a_cache_in_any_parts_is_the_whole(made, parts):
    made, some, cache = made.float(), x.float(), Cache(12)
    pieces = [made(part, at, None, cache) for part, at in zip(some.split(parts, 1), POSITIONS.split(parts, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), made(some, POSITIONS), rtol=0, atol=1e-5)
    assert cache.nbytes == 2 * 12 * made.cache_bytes_per_token(torch.float32)


@pytest.mark.parametrize("made", [grouped(2), latent()], ids=["gqa", "mla"])
def test_only_distances_matter(made):
    made = made.double()
    torch.testing.assert_close(made(x, POSITIONS + 37), made(x, POSITIONS), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GroupedQueryAttention(24, 6, 4, 4), "heads=6 cannot be dealt out to groups=4"),
        (lambda: GroupedQueryAttention(24, 6, 4, 0), "groups=0"),
        (lambda: GroupedQueryAttention(24, 6, 5, 2), "head_width=5 is odd"),
        (lambda: LatentAttention(24, 6, 4, (8, 0), 4), r"latents=\[8, 0\]"),
        (lambda: LatentAttention(24, 6, 4, (8, 8), 3), "rotary_width=3"),
    ],
)
def test_what_cannot_be_built_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
