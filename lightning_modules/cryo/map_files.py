"""Densities as MRC files."""

from pathlib import Path

import mrcfile
import numpy as np
from jaxtyping import Float
from torch import Tensor


def write(path: Path, density: Float[Tensor, "depth height width"], voxel_size: float) -> None:
    """Write a map (axes z, y, x; voxel size in angstrom) that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    with mrcfile.new(beside, overwrite=True) as file:
        file.set_data(density.float().cpu().numpy().astype(np.float32))
        file.voxel_size = voxel_size
    beside.replace(path)
