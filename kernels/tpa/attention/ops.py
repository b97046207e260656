"""Attention on factors: the public functions, which choose kernel or reference, and the registration with PyTorch."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.tpa.attention import configs, reference
from kernels.tpa.contraction.ops import contract, last_axis_contiguous, refuse_no_rank
from kernels.tpa.dispatch import Impl, refuse_mixed, takes_kernel


def attention(
    a_q: Float[Tensor, "batch new rank_q heads"],
    b_q: Float[Tensor, "batch new rank_q dim"],
    a_k: Float[Tensor, "batch kept rank_k heads"],
    b_k: Float[Tensor, "batch kept rank_k dim"],
    a_v: Float[Tensor, "batch kept rank_v heads"],
    b_v: Float[Tensor, "batch kept rank_v value"],
    query_lengths: Int[Tensor, " batch"] | None = None,
    key_lengths: Int[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "#batch #heads new kept"] | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "batch new heads value"]:
    """softmax(scale Q K^T) V of factors (arXiv 2501.06425, section 3), differentiable; `b_q` and `b_k` are rotated.

    The kernel keeps factors only and makes Q, K and V again wherever it needs a tile of them. Rows hold
    `query_lengths` queries and `key_lengths` keys (all, where not given), the last query standing at the last key; what
    sees nothing gives zeros. A `mask` decides alone which keys are seen. `dropout` falls on the probabilities. `scale`
    is 1 / sqrt(dim) by default.

    Without `impl` tiles are taken on a GPU up to `configs.MATERIALISE_FROM` keys and for rows of different lengths;
    else, and with a mask or dropout, heads are made and given to PyTorch's attention. Raises ValueError for mixed
    dtypes, lengths beside a mask, and as `dispatch.takes_kernel`.
    """
    factors = (a_q, b_q, a_k, b_k, a_v, b_v)
    _refuse(factors)
    if mask is not None and (query_lengths is not None or key_lengths is not None):
        raise ValueError("attention: a mask decides alone which keys are seen, so give lengths or a mask, not both")
    scale = b_q.shape[-1] ** -0.5 if scale is None else scale
    batch, new, kept, ragged = *a_q.shape[:2], a_k.shape[1], query_lengths is not None or key_lengths is not None
    unsupported = _masked(mask, dropout) or _too_wide(factors) or (None if ragged else _long(impl, new, kept))
    if not takes_kernel("attention", impl, unsupported, *factors):
        how = "torch" if impl == "torch" else "auto"
        q, k, v = (contract(a, b, how) for a, b in (factors[:2], factors[2:4], factors[4:]))
        if ragged:
            mask = reference.seen(new, kept, *_both(query_lengths, key_lengths, batch, new, kept, q.device), causal)
        return reference.attend(q, k, v, mask, causal, dropout, scale)
    rows = (x.flatten(0, 1) for x in factors)
    places = (None, query_lengths, None, key_lengths, new, kept, batch)
    return torch.ops.tessera.tpa_attention(*rows, *places, causal, scale)[0].unflatten(0, (batch, new))


def packed_attention(
    a_q: Float[Tensor, "queries rank_q heads"],
    b_q: Float[Tensor, "queries rank_q dim"],
    a_k: Float[Tensor, "keys rank_k heads"],
    b_k: Float[Tensor, "keys rank_k dim"],
    a_v: Float[Tensor, "keys rank_v heads"],
    b_v: Float[Tensor, "keys rank_v value"],
    query_starts: Int[Tensor, " starts"],
    key_starts: Int[Tensor, " starts"],
    longest_query: int,
    longest_key: int,
    causal: bool = True,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "queries heads value"]:
    """`attention` within sequences that lie side by side: sequence i from `starts[i]` to before `starts[i + 1]`.

    `longest_query` and `longest_key` bound their lengths, which may be 0. Raises ValueError as `attention`.
    """
    factors = (a_q, b_q, a_k, b_k, a_v, b_v)
    _refuse(factors)
    scale = b_q.shape[-1] ** -0.5 if scale is None else scale
    if takes_kernel("packed_attention", impl, _too_wide(factors), *factors):
        starts = (query_starts[:-1], query_starts.diff(), key_starts[:-1], key_starts.diff())
        longest = (longest_query, longest_key, len(query_starts) - 1)
        return torch.ops.tessera.tpa_attention(*factors, *starts, *longest, causal, scale)[0]
    values = a_q.new_zeros(len(a_q), a_q.shape[2], b_v.shape[2])
    places = zip(*(starts.tolist() for starts in (query_starts, query_starts[1:], key_starts, key_starts[1:])))
    pieces = []
    for q0, q1, k0, k1 in places:
        part = (*(x[None, q0:q1] for x in factors[:2]), *(x[None, k0:k1] for x in factors[2:]))
        pieces.append(attention(*part, causal=causal, scale=scale, impl="torch")[0])
    return torch.cat([*pieces, values[query_starts[-1] :]])


def _refuse(factors: tuple[Tensor, ...]) -> None:
    refuse_mixed("attention", **dict(zip(("a_q", "b_q", "a_k", "b_k", "a_v", "b_v"), factors)))
    refuse_no_rank("attention", *(x.shape[-2] for x in factors))


def _masked(mask: Tensor | None, dropout: float) -> str | None:
    if mask is not None:
        return "it takes no mask but the causal one and lengths"
    return f"it has no dropout={dropout}" if dropout else None


def _too_wide(factors: tuple[Tensor, ...]) -> str | None:
    widest = max(x.shape[-1] for x in factors[1::2])
    return f"heads of dim={widest} are wider than {configs.WIDEST}" if widest > configs.WIDEST else None


def _long(impl: str, new: int, kept: int) -> str | None:
    if impl == "auto" and new == kept >= configs.MATERIALISE_FROM:
        return f"{kept} keys are {configs.MATERIALISE_FROM} or more"
    return None


def _both(
    query_lengths: Tensor | None, key_lengths: Tensor | None, batch: int, new: int, kept: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Both lengths, whole rows where they are not given."""
    whole = (torch.full((batch,), n, device=device) for n in (new, kept))
    return tuple(n if given is None else given for given, n in zip((query_lengths, key_lengths), whole))


@torch.library.custom_op("tessera::tpa_attention", mutates_args=())
def _attention(
    a_q: Tensor,
    b_q: Tensor,
    a_k: Tensor,
    b_k: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    query_starts: Tensor | None,
    query_lengths: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    longest_query: int,
    longest_key: int,
    sequences: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from kernels.tpa.attention import launch

    factors = [last_axis_contiguous(x) for x in (a_q, b_q, a_k, b_k, a_v, b_v)]
    queries = launch.Sequences(query_starts, query_lengths, longest_query).contiguous()
    keys = launch.Sequences(key_starts, key_lengths, longest_key).contiguous()
    return launch.forward(factors, queries, keys, sequences, causal, scale)


@_attention.register_fake
def _(a_q, b_q, a_k, b_k, a_v, b_v, *_):
    wide = torch.promote_types(a_q.dtype, torch.float32)
    heads = a_q.shape[2]
    return a_q.new_empty(a_q.shape[0], heads, b_v.shape[2]), a_q.new_empty(heads, a_q.shape[0], dtype=wide)


@torch.library.custom_op("tessera::tpa_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    a_q: Tensor,
    b_q: Tensor,
    a_k: Tensor,
    b_k: Tensor,
    a_v: Tensor,
    b_v: Tensor,
    query_starts: Tensor | None,
    query_lengths: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    longest_query: int,
    longest_key: int,
    sequences: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from kernels.tpa.attention import launch

    factors = [last_axis_contiguous(x) for x in (a_q, b_q, a_k, b_k, a_v, b_v)]
    queries = launch.Sequences(query_starts, query_lengths, longest_query).contiguous()
    keys = launch.Sequences(key_starts, key_lengths, longest_key).contiguous()
    return launch.backward(dout.contiguous(), out, lse, factors, queries, keys, sequences, causal, scale)


@_attention_backward.register_fake
def _(dout, out, lse, a_q, b_q, a_k, b_k, a_v, b_v, *_):
    return tuple(x.new_empty(x.shape) for x in (a_q, b_q, a_k, b_k, a_v, b_v))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.mark_non_differentiable(output[1])
    ctx.rest = inputs[10:]


def _gradient(ctx, dout: Tensor, dlse: Tensor | None):
    made = torch.ops.tessera.tpa_attention_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return *made, *[None] * 9


_attention.register_autograd(_gradient, setup_context=_save)
