"""From the files of an entry to grids that crops are cut from: one voxel size, a cube, density over its scale."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import binary_dilation, generate_binary_structure, median_filter

from datamodules.map_entries import Entry, check_same_grid
from datamodules.mrc import MapFormatError, MapRecord, read_map
from datamodules.regridding import on_cube, padded
from datamodules.structures import ENDINGS, structure_map

log = logging.getLogger(__name__)

VERSION = 1  # raise it when what is made of a file changes
TARGETS = ("map", "halves", "half2")
SMALL_EDGE = 32  # below, a high percentile is the value of one voxel
EIGHTEEN = generate_binary_structure(3, 2)


@dataclass(frozen=True)
class Processing:
    """What is made of an entry. `voxel_size` in angstrom, `box` the edge of a crop in voxels.

    `target` is the density: the primary map, the mean of the half maps, or the second of them (CryoFM2). `percentile`
    is the scale, `clip_negative` cuts the density to [0, 1] times it (CryoFM1). Near density is what is above
    `threshold` times the scale, or above the entry's contour level, grown by `dilate` voxels. `resolution` (angstrom)
    is that of structures that stand in the place of maps.
    """

    voxel_size: float
    box: int
    target: str
    percentile: float
    clip: bool
    threshold: float
    dilate: int
    nan_policy: str
    allow_anisotropic: bool
    assume_voxel_size: float | None
    precision: str
    resolution: float = 0.0


@dataclass(frozen=True, eq=False)
class Processed:
    """Cubic grids over `scale`: `density`, where there are `half1`, `half2` and `mask`, and `occupied`.

    `voxel_size` is the true one, in angstrom.
    """

    grids: dict[str, np.ndarray]
    scale: float
    voxel_size: float


def process(entry: Entry, settings: Processing) -> Processed:
    """Read, check, resample, scale. Raises MapFormatError in one sentence."""
    records = _records(entry, settings)
    cubes = {name: on_cube(record, settings.voxel_size) for name, record in records.items()}
    grids, first = {name: cube.voxels for name, cube in cubes.items()}, next(iter(cubes.values()))
    density = {"halves": lambda: (grids["half1"] + grids["half2"]) / 2, "half2": lambda: grids["half2"]}
    grids["density"] = grids.pop("map") if settings.target == "map" else density[settings.target]()
    scale = scale_of(grids["density"], settings.percentile, first.path)
    for name in grids.keys() - {"mask"}:
        grids[name] = grids[name] / np.float32(scale)
    if settings.clip:
        grids["density"] = grids["density"].clip(0, 1)
    if "mask" in grids:
        grids["mask"] = grids["mask"].clip(0, 1)
    level = settings.threshold if entry.contour is None or settings.target != "map" else entry.contour / scale
    edge = max(len(grids["density"]), 2 * settings.box)
    grids = {name: padded(grid, edge).astype(settings.precision) for name, grid in grids.items()}
    return Processed({**grids, "occupied": near(grids["density"], level, settings.dilate)}, scale, first.voxel_size)


def _records(entry: Entry, settings: Processing) -> dict[str, MapRecord]:
    """The maps that the target needs, on one grid; a mask goes with them when it lies on that grid too."""
    names = ["map"] if settings.target == "map" else ["half1", "half2"]
    files = {name: getattr(entry, name) for name in [*names, "mask"]}
    if missing := [name for name in names if files[name] is None]:
        there = entry.files[0] if entry.files else entry.id
        raise MapFormatError(
            there, f"has no {missing[0]} beside it, which data.target={settings.target} needs: change it"
        )
    records = {
        name: _record(path, settings.assume_voxel_size or entry.voxel_size, settings)
        for name, path in files.items()
        if path
    }
    first, *others = records.values()
    for other in others:
        check_same_grid(first, other)
    for record in records.values():
        for odd in record.warnings:
            log.warning("%s: %s", record.path, odd)
    return records


def _record(path: Path, voxel_size: float | None, settings: Processing) -> MapRecord:
    if path.name.lower().endswith(ENDINGS):
        return structure_map(path, settings.voxel_size, settings.resolution)
    return read_map(
        path,
        voxel_size=voxel_size,
        allow_anisotropic=settings.allow_anisotropic,
        nan_policy=settings.nan_policy,
    )


def scale_of(density: Float[np.ndarray, "z y x"], percentile: float, path: Path | str) -> float:
    """The value that counts as 1: a percentile of the whole map; below 32 voxels the largest median of 3^3 voxels.

    Raises MapFormatError unless it is positive; warns where negative density is stronger than positive.
    """
    if min(density.shape) < SMALL_EDGE:
        smooth = median_filter(density, 3)
        scale, below = float(smooth.max()), float(smooth.min())
    else:
        below, scale = (float(value) for value in np.percentile(density, [100 - percentile, percentile]))
    if not scale > 0:
        raise MapFormatError(
            path, f"has no positive density (its scale is {scale:g}): invert its contrast or leave it out"
        )
    if -below > scale:
        log.warning("%s has stronger negative (%.4g) than positive density (%.4g): is it inverted?", path, below, scale)
    return scale


def near(density: Float[np.ndarray, "z y x"], level: float, dilate: int) -> Bool[np.ndarray, "z y x"]:
    """Voxels above a level, grown `dilate` times by their 18 neighbours."""
    above = density > level
    return binary_dilation(above, EIGHTEEN, dilate) if dilate else above
