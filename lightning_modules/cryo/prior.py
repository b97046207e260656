"""A trained prior over densities, in a folder: config.json and model.safetensors, whole or not at all."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules import weights
from lightning_modules.cryo.hdit import HDiT
from lightning_modules.cryo.unet import UNet
from lightning_modules.cryo.unet3d import UNet3D
from lightning_modules.processes.paths import Linear
from lightning_modules.processes.prediction import Prediction

NETWORKS: dict[str, type[nn.Module]] = {network.__name__: network for network in (HDiT, UNet, UNet3D)}
UNITS = ("mean", "std", "voxel_size", "box")


@dataclass(frozen=True)
class DensityPrior:
    """A network that predicts the velocity of z = (density / scale - mean) / std, and what it was trained on.

    Cubes of `box` voxels of `voxel_size` angstrom; data at t = 0, noise at t = 1.
    """

    network: nn.Module
    mean: float
    std: float
    voxel_size: float
    box: int

    @property
    def prediction(self) -> Prediction:
        """What samplers and posterior sampling take."""
        return Prediction(Linear(), self.network, "velocity")

    def density(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Density over its scale."""
        return z * self.std + self.mean

    def standardised(self, density: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """z of a density over its scale."""
        return (density - self.mean) / self.std


def save(folder: Path, prior: DensityPrior, build: Callable[[], nn.Module]) -> None:
    """Write a prior whose network `build` makes anew; while this is going on the folder has no config.json."""
    config = {"network": described(build), **{name: getattr(prior, name) for name in UNITS}}
    weights.write(folder, config, prior.network.state_dict())


def load(folder: Path, build: Callable[[], nn.Module] | None = None) -> DensityPrior:
    """The prior of a folder that `save` wrote, frozen and in eval mode; `build` makes a network that is not ours.

    Raises FileNotFoundError or ValueError where it is absent, incomplete, damaged or of an unknown network.
    """
    config = read_config(folder)
    network = (build or _builder(config["network"], folder))()
    network.load_state_dict(weights.read(folder))
    return DensityPrior(network.requires_grad_(False).eval(), **{name: config[name] for name in UNITS})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a prior's folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no prior (it has no config.json): give the export folder of a run")
    config = json.loads(path.read_text())
    if missing := [name for name in ("network", *UNITS) if name not in config]:
        raise ValueError(f"{path} says nothing of {missing[0]}: it is not the export of model=cryofm")
    return config


def described(build: Callable[[], nn.Module]) -> dict[str, Any]:
    """The class of a network and its arguments, as JSON has them."""
    partial = build if isinstance(build, functools.partial) else functools.partial(build)
    return {"class": partial.func.__name__, **partial.keywords}


def _builder(description: dict[str, Any], folder: Path) -> Callable[[], nn.Module]:
    arguments = dict(description)
    if (name := arguments.pop("class")) not in NETWORKS:
        raise ValueError(f"{folder} is of a network {name}, and known are {', '.join(NETWORKS)}: give its maker")
    return functools.partial(NETWORKS[name], **arguments)
