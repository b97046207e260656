"""What an optimizer does alone on the shards of a process, and the sums that it needs from the other processes.

Reducing a DTensor by `float()` or `.item()` gives the part of one process without an error; so does `_foreach_norm`.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's shares, in the memory of the tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def squared_norms(shares: Sequence[Tensor], like: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """The squared Euclidean norm of each whole tensor, in float64, from this process's share of it.

    `like` are the parameters, whose placements the shares have. One reduction for all that are placed alike.
    """
    widest = functools.reduce(torch.promote_types, {share.dtype for share in shares}, torch.float32)
    squares = torch.stack(torch._foreach_norm(list(shares), 2, widest)).double().square()
    places = defaultdict(list)
    for index, tensor in enumerate(like):
        if isinstance(tensor, DTensor):
            places[tensor.device_mesh, tensor.placements].append(index)
    for (mesh, placements), indices in places.items():
        summed = squares[indices]
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(summed, group=mesh.get_group(dim))
        squares[indices] = summed
    return squares


def gathered(share: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, on every process that holds a share of it, placed as `like`."""
    if not isinstance(like, DTensor):
        return share
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(share, like.device_mesh, like.placements, **layout).full_tensor()


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """The share of a whole tensor that this process holds of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements).to_local()
