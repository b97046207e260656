"""Maps that are simulated, as a data set and a stand-in for EMDB: generated bundles of helices and strands."""

import numpy as np

from datamodules.atom_density import molmap
from datamodules.bundles import bundle
from datamodules.map_crops import WholeMap

VERSION = 1  # raise it when the maps change
PARTS = {"train": 0, "val": 1, "test": 2}


def bundle_maps(part: str, count: int, box: int, voxel_size: float, resolution: float, seed: int) -> list[WholeMap]:
    """The first `count` maps of a part, over their maximum; no bundle of a part is in another one."""
    return [_bundle_map(part, number, box, voxel_size, resolution, seed) for number in range(count)]


def _bundle_map(part: str, number: int, box: int, voxel_size: float, resolution: float, seed: int) -> WholeMap:
    rng = np.random.default_rng(np.random.SeedSequence((seed % 2**63, PARTS[part], number)))
    atoms, charges = bundle(rng)
    origin = np.full(3, -(box // 2) * voxel_size)
    density = molmap(atoms, charges, resolution, (box,) * 3, voxel_size, origin)
    scale = float(density.max())
    return WholeMap(f"{part}-{number}", (density / scale).astype(np.float32), scale, voxel_size)
