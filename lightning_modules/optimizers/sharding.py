"""What an optimizer does alone on the shards of a process, and the sums that it needs from the other processes.

Reducing a DTensor by `float()` or `.item()` gives the part of one process without an error; so does `_foreach_norm`.
"""

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
    """The squared Euclidean norm of each whole tensor, from this process's share of it.

    `like` are the parameters, whose placements the shares have. One reduction for all that are placed alike. Rows,
    which are never divided, are summed in their own precision and all else in float64: the result is then the same for
    any number of processes, and hardly slower than `_foreach_norm`.
    """
    rows = [_row_norms(share) for share in shares]
    lengths = [len(norms) for norms in rows]
    squares = torch.stack([row.sum() for row in torch.cat(rows).double().square().split(lengths)])
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


def _row_norms(share: Tensor) -> Float[Tensor, " rows"]:
    matrix = share.flatten(1) if share.ndim > 1 else share.reshape(-1, 1)
    return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(share.dtype, torch.float32))


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
