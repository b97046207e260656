"""What FSDP2 has sharded, made whole again."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of the module."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in memory of its own. Collective where the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor where and as another one is: its device and dtype, and its shards. Collective where it has any."""
    if not isinstance(like, DTensor):
        return tensor.to(like)
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


def unsharded(module: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The module itself, or, when it is sharded, a plain copy in eval mode that is loaded into what `build` makes.

    Collective: every process calls it, and may then do with the copy what the others do not.
    """
    if not is_sharded(module):
        return module
    state = {name: whole(tensor) for name, tensor in module.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # the numbers drawn for weights that are overwritten
        copy = build().to(next(iter(state.values())).device)
    copy.load_state_dict(state, assign=True)
    return copy.requires_grad_(False).eval()
