"""The authors' published weights (ByteDance-Seed/cryofm), read from a local file into our networks.

The modules of `HDiT` and `UNet3D` have the names of the authors' code, so that what is left to map is small: the prefix
of their LightningModule (`model.`), the shadow weights of its exponential mean (`model_ema.`, whose names have `__` in
the place of dots), and the time, which their transformer counts in thousandths: cos(2 pi w 1000 t) has 1000 w for w.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

STEPS = 1000  # in which the authors count a path's time
UNITS = {"mean": 0.04, "std": 0.09}  # of density over its scale, that they train in


def load(network: nn.Module, path: Path) -> None:
    """Fill a network with published weights, from safetensors or a PyTorch file; the exponential mean where it has one.

    Raises FileNotFoundError or ValueError where the file cannot be read, executes code, or is of another network.
    """
    tensors = renamed(read(path))
    refuse_another(network, tensors, path)
    if "time_emb.weight" in tensors:
        tensors["time_emb.weight"] = tensors["time_emb.weight"] * STEPS
    network.load_state_dict(tensors)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names there."""
    if not path.is_file():
        raise FileNotFoundError(f"model.weights={path} is no file: give a *.safetensors, a *.ckpt, or an export folder")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        wrong = "is damaged" if isinstance(error, SafetensorError) else "cannot be read without running code from it"
        raise ValueError(f"model.weights={path} {wrong}: save its state dict as safetensors") from error
    found = found.get("state_dict", found)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under the names of our networks."""
    ours = {name.removeprefix("model."): value for name, value in tensors.items() if not name.startswith("model_ema.")}
    shadows = {name.replace(".", "__"): name for name in ours}
    for name, value in tensors.items():
        if shadow := shadows.get(name.removeprefix("model_ema.")) if name.startswith("model_ema.") else None:
            ours[shadow] = value
    return ours


def refuse_another(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError where names or shapes are not those of the network."""
    here = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in tensors.items()}
    different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"model.weights={path} is of another network: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} here ({len(different)} differences); choose the network by "
            "network@model.network=cryofm_s, cryofm_l or cryofm2"
        )
