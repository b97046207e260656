"""From factors to heads: the public functions, which choose kernel or reference, and the registration with PyTorch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.tpa.contraction import configs, reference
from kernels.tpa.dispatch import Impl, refuse_mixed, takes_kernel


def contract(
    a: Float[Tensor, "*tokens rank heads"], b: Float[Tensor, "*tokens rank dim"], impl: Impl = "auto"
) -> Float[Tensor, "*tokens heads dim"]:
    """Heads X = 1/R sum_r a_r b_r^T (arXiv 2501.06425, eq. 3.1), summed in float32 and rounded once; differentiable.

    Raises ValueError for factors of different dtypes, for no rank, and as `dispatch.takes_kernel`.
    """
    refuse_mixed("contract", a=a, b=b)
    refuse_no_rank("contract", a.shape[-2])
    if not takes_kernel("contract", impl, configs.unsupported(a.shape[-1], b.shape[-1]), a, b):
        return reference.contract(a, b)
    x = torch.ops.tessera.tpa_contract(a.flatten(0, -3), b.flatten(0, -3))
    return x.view(*a.shape[:-2], *x.shape[1:])


def rotary_table(
    length: int, dim: int, base: float = 10_000.0, sign: int = 1, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "length half"], Float[Tensor, "length half"]]:
    """Cosines and sines of the angles sign p base^(-2i / dim), float32: in bfloat16 neighbouring positions coincide.

    With `sign` 1 dimension i turns with i + dim / 2 as in arXiv 2104.09864; the official TPA weights want -1.
    Raises ValueError for an odd `dim`.
    """
    if dim % 2:
        raise ValueError(f"a rotation turns pairs, but dim={dim} is odd: take an even one")
    frequencies = base ** -(torch.arange(dim // 2, device=device, dtype=torch.float64) / (dim // 2))
    angles = sign * torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(
    b: Float[Tensor, "*tokens rank dim"],
    cos: Float[Tensor, "table half"],
    sin: Float[Tensor, "table half"],
    positions: Int[Tensor, "*tokens"],
    impl: Impl = "auto",
) -> Float[Tensor, "*tokens rank dim"]:
    """Token factors turned by the angles of their positions, which turns every head (Theorem 3.1); differentiable in b.

    Raises ValueError for tables that do not fit `dim` and for positions past them, and as `dispatch.takes_kernel`. On a
    GPU, where looking would make it wait, an assertion on the device stops the process, in the kernel as in PyTorch.
    """
    refuse_no_rank("rotate", b.shape[-2])
    _refuse_table("rotate", b.shape[-1], cos, positions)
    if not takes_kernel("rotate", impl, None, b):
        return reference.rotate(b, cos, sin, positions)
    y = torch.ops.tessera.tpa_rotate(b.flatten(0, -3), cos, sin, positions.flatten(), False)
    return y.view(b.shape)


def qkv(
    projection: Float[Tensor, "*tokens row"],
    cos: Float[Tensor, "table half"],
    sin: Float[Tensor, "table half"],
    positions: Int[Tensor, "*tokens"],
    ranks: Sequence[int],
    heads: int,
    dims: Sequence[int],
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "*tokens _ dim"], Float[Tensor, "*tokens _ dim"], Float[Tensor, "*tokens _ value"]]:
    """Q, K, V of one merged projection: split, rotation of B_Q and B_K, contractions, in one pass; differentiable.

    A row is [A_Q | B_Q | A_K | B_K | A_V | B_V], each rank after rank, `ranks` and `dims` those of Q, K and V. Raises
    ValueError for a row of another width and as `rotate`.
    """
    ranks, dims = list(ranks), list(dims)
    refuse_no_rank("qkv", min(ranks))
    _refuse_row(projection.shape[-1], ranks, heads, dims)
    _refuse_table("qkv", dims[0], cos, positions)
    if not takes_kernel("qkv", impl, configs.unsupported(heads, *dims), projection):
        return reference.qkv(projection, cos, sin, positions, ranks, heads, dims)
    rows = projection.flatten(0, -2)
    made = torch.ops.tessera.tpa_qkv(rows, cos, sin, positions.flatten(), ranks, heads, dims)
    return tuple(x.view(*projection.shape[:-1], *x.shape[1:]) for x in made)


def refuse_no_rank(op: str, *ranks: int) -> None:
    """Raises ValueError for a rank below 1."""
    if min(ranks) < 1:
        raise ValueError(f"{op}: rank={min(ranks)} is no sum of outer products: take 1 or more")


def last_axis_contiguous(x: Tensor) -> Tensor:
    """The tensor as the training kernels read it: a view of a projection as it is, others copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuse_table(op: str, dim: int, cos: Tensor, positions: Tensor) -> None:
    if 2 * cos.shape[-1] != dim:
        raise ValueError(f"{op}: a table of {cos.shape[-1]} angles turns dim={2 * cos.shape[-1]}, not dim={dim}")
    # a look at positions on a GPU waits for it, and breaks a compiled graph
    if positions.is_cuda or torch.compiler.is_compiling() or not positions.numel():
        return
    least, most = positions.min().item(), positions.max().item()
    if least < 0 or most >= len(cos):
        raise ValueError(
            f"{op}: position {most if most >= len(cos) else least} is outside the table of {len(cos)} positions: "
            "make it longer with rotary_table"
        )


def _refuse_row(width: int, ranks: list[int], heads: int, dims: list[int]) -> None:
    if dims[0] != dims[1]:
        raise ValueError(f"qkv: queries of dim={dims[0]} cannot meet keys of dim={dims[1]}: make them equal")
    fits = sum(rank * (heads + dim) for rank, dim in zip(ranks, dims))
    if width != fits:
        raise ValueError(f"qkv: ranks={ranks} of heads={heads} and dims={dims} make rows of {fits}, not of {width}")


@torch.library.custom_op("tessera::tpa_contract", mutates_args=())
def _contract(a: Tensor, b: Tensor) -> Tensor:
    from kernels.tpa.contraction import launch

    return launch.contract(last_axis_contiguous(a), last_axis_contiguous(b))


@_contract.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[2], b.shape[2])


@torch.library.custom_op("tessera::tpa_contract_backward", mutates_args=())
def _contract_backward(dx: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    from kernels.tpa.contraction import launch

    return launch.contract_backward(dx.contiguous(), last_axis_contiguous(a), last_axis_contiguous(b))


@_contract_backward.register_fake
def _(dx: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


_contract.register_autograd(
    lambda ctx, dx: torch.ops.tessera.tpa_contract_backward(dx, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("tessera::tpa_rotate", mutates_args=())
def _rotate(b: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, backward: bool) -> Tensor:
    from kernels.tpa.contraction import launch

    return launch.rotate(last_axis_contiguous(b), cos.contiguous(), sin.contiguous(), positions.contiguous(), backward)


@_rotate.register_fake
def _(b: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, backward: bool) -> Tensor:
    return b.new_empty(b.shape)


def _save_angles(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.backward = inputs[4]


def _rotate_gradient(ctx, dy: Tensor):
    return torch.ops.tessera.tpa_rotate(dy, *ctx.saved_tensors, not ctx.backward), None, None, None, None


_rotate.register_autograd(_rotate_gradient, setup_context=_save_angles)


@torch.library.custom_op("tessera::tpa_qkv", mutates_args=())
def _qkv(
    projection: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    ranks: Sequence[int],
    heads: int,
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.tpa.contraction import launch

    tables = (cos.contiguous(), sin.contiguous(), positions.contiguous())
    return launch.qkv(last_axis_contiguous(projection), *tables, ranks, heads, dims)


@_qkv.register_fake
def _(projection, cos, sin, positions, ranks, heads, dims):
    return tuple(projection.new_empty(projection.shape[0], heads, dim) for dim in dims)


@torch.library.custom_op("tessera::tpa_qkv_backward", mutates_args=())
def _qkv_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    projection: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    ranks: Sequence[int],
) -> Tensor:
    from kernels.tpa.contraction import launch

    given = (dq.contiguous(), dk.contiguous(), dv.contiguous(), last_axis_contiguous(projection))
    return launch.qkv_backward(*given, cos.contiguous(), sin.contiguous(), positions.contiguous(), ranks)


@_qkv_backward.register_fake
def _(dq, dk, dv, projection, cos, sin, positions, ranks):
    return projection.new_empty(projection.shape)


def _save_projection(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.ranks = inputs[4]


def _qkv_gradient(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    drow = torch.ops.tessera.tpa_qkv_backward(dq, dk, dv, *ctx.saved_tensors, ctx.ranks)
    return drow, None, None, None, None, None, None


_qkv.register_autograd(_qkv_gradient, setup_context=_save_projection)
