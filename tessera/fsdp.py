"""FSDP2 in Lightning: the device mesh, and checkpoints in one file or in one folder."""

from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tessera import ranks, sharded
from tessera.checkpoints import confirm, recorded

T = TypeVar("T")


class Sharding(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all processes.

    With `replicas` > 1 they are sharded over the processes of a group, of which there are so many, and gradients are
    averaged over the groups (hybrid sharding): what is gathered in a forward then stays within the node.
    With `folders`, a checkpoint is a folder to which every process writes its part; else process 0 gathers one file.
    Both are read, whatever the number of processes that wrote them.
    """

    def __init__(self, replicas: int = 1, folders: bool = False, timeout: timedelta | None = None) -> None:
        super().__init__(save_distributed_checkpoint=folders, timeout=timeout)
        self.replicas, self.folders = replicas, folders

    def setup_environment(self) -> None:
        self._setup_distributed()
        sizes = {"replicate": self.replicas} if self.replicas > 1 else {}
        sizes["shard"] = self.world_size // self.replicas
        self._device_mesh = init_device_mesh(self.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # Saving

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state, of which a folder keeps the parts, and its groups with their parameters' names."""
        if not self.folders:
            return super().optimizer_state(optimizer)
        state, names = optimizer.state_dict(), names_of(self.model)
        for saved, group in zip(state["param_groups"], optimizer.param_groups):
            saved["param_names"] = [names[parameter] for parameter in group["params"]]
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, complete or not at all. Raises OSError on every process where one cannot write."""
        path, first = Path(self.broadcast(filepath)), self.global_rank == 0
        if not self.folders:
            if first:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        beside = sharded.unfinished(path)
        together(lambda: sharded.prepare(path) if first else None)
        written = together(lambda: sharded.write_parts(checkpoint, beside, self.global_rank))
        if first:
            entry = {"step": checkpoint["global_step"], **sharded.write_index(beside, written)}
            sharded.complete(path)
            self.checkpoint_io.enter(path, entry)
        self.barrier()

    # Loading

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Restore model and optimizers from a file or a folder, part by part; returns the rest.

        Raises ValueError on every process where a file is damaged, or the checkpoint is another model's.
        """
        path = Path(self.broadcast(checkpoint_path))
        files = sorted(recorded(path).items())
        together(lambda: [confirm(*file) for file in files[self.global_rank :: self.world_size]])
        checkpoint = sharded.lazy(path) if path.is_dir() else sharded.load_file(path)
        restore_model(self.model, checkpoint.pop("state_dict"))
        for optimizer, saved in zip(self.optimizers, checkpoint.pop("optimizer_states", [])):
            restore_optimizer(optimizer, saved, names_of(self.model))
        return checkpoint


def together(act: Callable[[], T]) -> list[T]:
    """What `act` returns on every process.

    An error that one of them meets is raised on all, as ValueError where it was one and as OSError else: one process
    that goes its own way would leave the others waiting.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = (isinstance(error, ValueError), f"{error} (process {ranks.rank()})")
    everyone = ranks.gather((result, failure))
    for refused, reason in (failure for _, failure in everyone if failure):
        raise (ValueError if refused else OSError)(reason)
    return [result for result, _ in everyone]


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """The name of each parameter, the same whether or not the model is compiled."""
    return {parameter: name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}


def part(whole: Tensor | sharded.Pieces, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`."""
    return whole[sharded.extent(like)]


@torch.no_grad()
def restore_model(model: nn.Module, saved: dict[str, Any]) -> None:
    """Copy this process's parts of the saved tensors into the model. Raises ValueError where names or shapes differ."""
    ours = get_model_state_dict(model)
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (ours, saved)]
    for name in {**ours, **saved}:
        here, there = (found.get(name, "absent") for found in shapes)
        if here != there:
            raise ValueError(f"the checkpoint is of another model: {name} is {there} there and {here} here")
    for name, tensor in ours.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.copy_(part(saved[name], tensor))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: dict[nn.Parameter, str]) -> None:
    """Give each parameter its saved state.

    State in the shape of its parameter is sharded as the parameter is; other state is the same on every process.
    Raises ValueError where the groups differ.
    """
    groups = matched(saved["param_groups"], optimizer.param_groups, names)
    keys = chain.from_iterable(group["params"] for group in groups)
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    state = {
        key: {name: laid_out(value, parameter) for name, value in saved["state"][key].items()}
        for key, parameter in zip(keys, parameters)
        if key in saved["state"]
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def matched(
    saved: list[dict[str, Any]], ours: list[dict[str, Any]], names: dict[nn.Parameter, str]
) -> list[dict[str, Any]]:
    """The saved groups, with the keys of their parameters in our order: by name, or by place where there are no names.

    Lightning takes a key for the place in the module, but in a file that one process wrote it is the place in the
    groups. Raises ValueError where a group has other parameters.
    """
    if len(saved) != len(ours):
        raise ValueError(f"the checkpoint's optimizer has {len(saved)} parameter groups, and here it has {len(ours)}")
    groups = []
    for theirs, group in zip(saved, ours):
        wanted = [names[parameter] for parameter in group["params"]]
        keys = dict(zip(theirs.get("param_names", wanted), theirs["params"]))
        if sorted(keys) != sorted(wanted):
            raise ValueError(f"the checkpoint's optimizer has other parameters in the group of {wanted[0]}")
        options = {key: value for key, value in theirs.items() if key != "param_names"}
        groups.append({**options, "params": [keys[name] for name in wanted]})
    return groups


def laid_out(value: Any, parameter: Tensor) -> Any:
    """Saved state as the optimizer keeps it: sharded as its parameter, if it has the parameter's shape."""
    if not isinstance(value, (Tensor, sharded.Pieces)):
        return value
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.whole() if isinstance(value, sharded.Pieces) else value.clone()
    local = part(value, parameter).clone().to(parameter.device)
    layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, **layout)
