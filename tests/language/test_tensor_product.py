"""Tensor product attention is what its factors say, whichever way it is computed, and contains MHA, MQA and GQA."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels.tpa import contract
from lightning_modules.language.attention import Cache, attend
from lightning_modules.language.rotary import rotate
from lightning_modules.language.tensor_product import (
    ConstantHeadFactors,
    ConstantTokenFactors,
    KeyValueAttention,
    SharedTokenFactors,
    TensorProductAttention,
    ThirdOrderAttention,
    attend_in_factors,
    columns,
)

KINDS = {
    "tpa": TensorProductAttention,
    "kvonly": KeyValueAttention,
    "constant_a": ConstantHeadFactors,
    "constant_b": ConstantTokenFactors,
    "shared_b": SharedTokenFactors,
    "third_order": partial(ThirdOrderAttention, orders=(4, 2)),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
both_signs = pytest.mark.parametrize("sign", [-1, 1])
POSITIONS = torch.arange(10)[None]


def factors(dtype=torch.float64, length: int = 10, heads: int = 5, ranks=(3, 2, 2), dim: int = 8, seed: int = 0):
    """A_Q, B_Q, A_K, B_K, A_V, B_V of two rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, length, rank, size) for rank in ranks for size in (heads, dim)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def layer(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return kind(24, 5, 8, (3, 2, 2), **{"init": "xavier", **options}).to(dtype)


def inputs(dtype=torch.float64, rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randn(rows, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def in_ranks(a_q, b_q, a_k, b_k, a_v, b_v):
    """Algorithm 1 of the paper's appendix: scores from the products of token factors that all heads share."""
    products = torch.einsum("bqrd,bksd->bqkrs", b_q, b_k)
    scale = 1 / (a_q.shape[2] * a_k.shape[2] * math.sqrt(b_q.shape[-1]))
    scores = torch.einsum("bqrh,bksh,bqkrs->bhqk", a_q, a_k, products) * scale
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkuh,bkue->bqhe", weights, a_v, b_v).flatten(2) / a_v.shape[2]


# ---- the two ways of computing it


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("ranks", [(3, 2, 2), (6, 1, 1)])
def test_keys_and_values_need_not_be_made_of_their_factors(dtype, atol, ranks):
    a_q, b_q, a_k, b_k, a_v, b_v = some = factors(dtype, ranks=ranks)
    q = contract(a_q, b_q)
    made = attend(q, contract(a_k, b_k), contract(a_v, b_v))
    torch.testing.assert_close(in_ranks(*some), made, rtol=0, atol=atol)
    for new in (1, 4, 10):
        read = attend_in_factors(q[:, -new:], a_k, b_k, a_v, b_v)
        torch.testing.assert_close(read, made[:, -new:], rtol=0, atol=atol)


def test_reading_factors_heeds_a_mask():
    a_q, b_q, *of_keys = factors()
    q, mask = contract(a_q, b_q)[:, -2:], torch.rand(2, 1, 2, 10, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., -1] = True
    made = attend(q, contract(*of_keys[:2]), contract(*of_keys[2:]), mask)
    torch.testing.assert_close(attend_in_factors(q, *of_keys, mask), made, rtol=0, atol=1e-12)


def test_a_contraction_is_rounded_once():
    a, b = factors(torch.bfloat16, ranks=(6, 2, 2))[:2]
    exact = torch.einsum("btrh,btrd->bthd", a.double(), b.double()) / 6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contract(a, b), exact.to(torch.bfloat16))


@both_signs
def test_turning_the_factors_turns_the_heads(sign):
    a, b = factors()[:2]
    turn = partial(rotate, positions=POSITIONS, sign=sign)
    torch.testing.assert_close(contract(a, turn(b)), turn(contract(a, b)), rtol=0, atol=1e-12)


# ---- what it contains


@pytest.mark.parametrize("groups", [6, 3, 1], ids=["mha", "gqa", "mqa"])
@both_signs
def test_constant_head_factors_make_it_grouped_query_attention(groups, sign):
    heads, dim = 6, 8
    _, b_q, _, b_k, _, b_v = factors(ranks=(heads, groups, groups), heads=heads, dim=dim)
    turn = partial(rotate, positions=POSITIONS, sign=sign)
    b_q, b_k = turn(b_q), turn(b_k)
    of_queries = (heads * torch.eye(heads, dtype=torch.float64)).expand(2, 10, -1, -1)
    group = torch.arange(heads) // (heads // groups)
    of_keys = (groups * F.one_hot(group, groups).T.double()).expand(2, 10, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (b_q, b_k, b_v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    found = attend_in_factors(contract(of_queries, b_q), of_keys, b_k, of_keys, b_v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_full_queries_are_factors_of_full_rank():
    only = layer(KeyValueAttention)
    torch.manual_seed(0)
    whole = TensorProductAttention(24, 5, 8, (5, 2, 2), init="xavier").double()
    _, b_q, *others = whole.c_attn.weight.data.split(whole._sizes())
    x = inputs()
    only.c_attn.weight.data = torch.cat(others)
    only.c_proj.weight.data = whole.c_proj.weight.data
    only.c_q.weight.data = b_q
    given = whole._factors(x, POSITIONS) | {"a_q": (5 * torch.eye(5).double()).expand(2, 10, -1, -1)}
    whole._factors = lambda x, positions: given
    torch.testing.assert_close(only(x, POSITIONS), whole(x, POSITIONS), rtol=0, atol=1e-12)


def test_shared_token_factors_are_tied_ones():
    shared, whole = layer(SharedTokenFactors), layer(TensorProductAttention)
    a_q, b_q, a_k, a_v, b = shared.c_attn.weight.data.split(shared._sizes())
    whole.c_attn.weight.data = torch.cat([a_q, b_q, a_k, b, a_v, b])
    whole.c_proj.weight.data = shared.c_proj.weight.data
    torch.testing.assert_close(shared(inputs(), POSITIONS), whole(inputs(), POSITIONS), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "letter"), [(ConstantHeadFactors, "a"), (ConstantTokenFactors, "b")])
def test_constant_factors_are_those_of_a_constant_input(kind, letter):
    """With an input that is 1 in one place, the row of that place is the constant."""
    constant, whole = layer(kind), layer(TensorProductAttention)
    weights = dict(zip(constant.projected, constant.c_attn.weight.data.split(constant._sizes())))
    for name, value in constant.constants.items():
        weights[name] = F.pad(value.data.flatten()[:, None], (0, 23))
    for name in constant.projected:
        weights[name][:, 0] = 0
    whole.c_attn.weight.data = torch.cat([weights[name] for name in whole.projected])
    whole.c_proj.weight.data = constant.c_proj.weight.data
    x = inputs()
    x[..., 0] = 1
    torch.testing.assert_close(constant(x, POSITIONS), whole(x, POSITIONS), rtol=0, atol=1e-12)
    assert letter in constant.constant[0]


@both_signs
def test_the_turn_of_a_third_order_factor_is_that_of_its_first(sign):
    """(I (x) R_t^T) vec(b c^T) = vec((R_t b) c^T), theorem C.1."""
    b, c = factors()[1], factors(dim=3)[1]
    angles = sign * 7 * 10_000 ** (-torch.arange(4).double() / 4)
    cos, sin = angles.cos().diag(), angles.sin().diag()
    turn = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
    expected = columns(b, c) @ torch.block_diag(turn, turn, turn).T
    found = columns(rotate(b, torch.full((1, 10), 7), sign=sign), c)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(columns(b, c)[..., 8:16], b * c[..., 1:2])


# ---- its symmetries


@every_kind
@both_signs
def test_only_distances_matter(kind, sign):
    attention = layer(kind, turn=partial(rotate, sign=sign))
    shifted = attention(inputs(), POSITIONS + 37)
    torch.testing.assert_close(shifted, attention(inputs(), POSITIONS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", [0, 2, 4], ids=["queries", "keys", "values"])
def test_factors_are_free_up_to_an_invertible_matrix(which):
    some = factors()
    before = in_ranks(*some)
    a, b = some[which : which + 2]
    g = torch.randn(a.shape[2], a.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    some[which] = torch.einsum("rs,btsh->btrh", g, a)
    some[which + 1] = torch.einsum("rs,btsd->btrd", torch.linalg.inv(g).T, b)
    torch.testing.assert_close(contract(*some[which : which + 2]), contract(a, b), rtol=0, atol=1e-12)
    torch.testing.assert_close(in_ranks(*some), before, rtol=0, atol=1e-12)


def test_keys_of_a_token_have_the_rank_of_their_factors():
    for rank in (1, 2, 3):
        _, _, a_k, b_k, _, _ = factors(ranks=(3, rank, 2))
        assert (torch.linalg.matrix_rank(contract(a_k, b_k)) == rank).all()


# ---- generation


@every_kind
@pytest.mark.parametrize("parts", [[10], [1] * 10, [1, 7, 2], [9, 1]])
def test_a_cache_in_any_parts_is_the_whole(kind, parts):
    attention, x, cache = layer(kind, torch.float32), inputs(torch.float32), Cache(12)
    pieces = [attention(part, at, None, cache) for part, at in zip(x.split(parts, 1), POSITIONS.split(parts, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), attention(x, POSITIONS), rtol=0, atol=1e-5)
    assert cache.nbytes == 2 * 12 * attention.cache_bytes_per_token(torch.float32)


def test_many_new_tokens_behind_kept_ones_are_the_whole():
    attention, x, cache = layer(TensorProductAttention, torch.float32), inputs(torch.float32, length=40), Cache(40)
    places = torch.arange(40)[None]
    pieces = [attention(part, at, None, cache) for part, at in zip(x.split([3, 30, 7], 1), places.split([3, 30, 7], 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), attention(x, places), rtol=0, atol=1e-5)


@every_kind
def test_a_token_changes_nothing_before_it(kind):
    attention, x = layer(kind, torch.float32), inputs(torch.float32)
    changed = x.clone()
    changed[:, 6] += 1
    before, after = attention(x, POSITIONS), attention(changed, POSITIONS)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6], after[:, 6])


# ---- the beginning

SIZES = {"small": (768, 34), "medium": (1024, 47), "large": (1280, 61), "xl": (1600, 78)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("init", ["official", "xavier"])
def test_heads_start_with_the_deviations_of_the_authors_code(size, init):
    width, heads = SIZES[size]
    torch.manual_seed(0)
    attention = TensorProductAttention(width, heads, 64, (6, 2, 2), init=init)
    x = F.rms_norm(torch.randn(1, 256, width), (width,))
    with torch.no_grad():
        parts = attention._factors(x, torch.zeros(1, 256, dtype=torch.long))
        q, k = contract(parts["a_q"], parts["b_q"]), contract(parts["a_k"], parts["b_k"])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
    found = [x.std().item() for x in (q, k, scores)]
    if init == "official":
        assert found == pytest.approx([0.0406, 0.122, 0.0049], rel=0.05)
    else:
        for value, (least, most) in zip(found, [(0.59, 0.64), (1.26, 1.30), (0.74, 0.84)]):
            assert 0.97 * least < value < 1.03 * most
    bounds = [attention._bound(name, init) for name in ("a_q", "b_q")]
    assert found[0] ** 2 == pytest.approx(math.prod(width * bound**2 / 3 for bound in bounds) / 6, rel=0.1)


@pytest.mark.parametrize("kind", [ConstantHeadFactors, ConstantTokenFactors])
def test_constants_start_as_wide_as_what_they_replace(kind):
    torch.manual_seed(0)
    constant, whole = kind(256, 64, 64, (6, 2, 2)), TensorProductAttention(256, 64, 64, (6, 2, 2))
    x = F.rms_norm(torch.randn(1, 256, 256), (256,))
    found = whole._factors(x, torch.zeros(1, 256, dtype=torch.long))
    for name, value in constant.constants.items():
        assert value.std().item() == pytest.approx(found[name].std().item(), rel=0.15)


# ---- bad input


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (TensorProductAttention, {"ranks": (6, 0, 2)}, r"ranks=\[6, 0, 2\]: take three of at least 1"),
        (TensorProductAttention, {"ranks": (6, 2)}, r"ranks=\[6, 2\]"),
        (TensorProductAttention, {"head_width": 7}, "head_width=7 leaves 7 to turn"),
        (TensorProductAttention, {"heads": 0}, "heads=0"),
        (TensorProductAttention, {"init": "zeros"}, "init='zeros' is none of official, xavier"),
        (SharedTokenFactors, {"ranks": (6, 2, 3)}, r"ranks=\[6, 2, 3\]: keys and values share"),
        (ThirdOrderAttention, {"orders": (4, 3)}, r"orders=\[4, 3\] must multiply to head_width=8"),
        (ThirdOrderAttention, {"orders": (1, 8)}, "leaves 1 to turn"),
    ],
)
def test_what_cannot_be_built_is_refused(kind, options, said):
    with pytest.raises(ValueError, match=said):
        kind(**{"width": 24, "heads": 5, "head_width": 8, "ranks": (6, 2, 2), **options})


def test_another_precision_than_the_kept_one_is_refused():
    attention, cache = layer(TensorProductAttention, torch.float32), Cache(12)
    attention(inputs(torch.float32), POSITIONS, None, cache)
    with pytest.raises(ValueError, match=r"a cache of torch.float32 cannot keep torch.bfloat16"):
        attention.bfloat16()(inputs(torch.bfloat16)[:, :1], POSITIONS[:, :1] + 10, None, cache)
