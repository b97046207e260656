"""Reading, resampling and scaling a map: `PYTHONPATH=$PWD python benchmarks/map_pipeline.py [--edge 256 --repeats 7]`.

Ours beside what one writes with mrcfile and scipy.ndimage, in turn in one process on one thread. The map is a sum of
Gaussians, so that the resampled one is known exactly: the error printed is the largest of a voxel, over the maximum.
Splines of the orders 3 and 5 are not as exact; mrcfile with scipy.fft, transforming the whole cube, is. No variant
filters before it interpolates, which splines would need on a map with finer detail than the new voxels hold.
"""

import argparse
import gzip
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import scipy.fft
import scipy.ndimage

from datamodules.atom_density import gaussians
from datamodules.map_processing import scale_of
from datamodules.mrc import MapRecord, read_map, save_map
from datamodules.regridding import grid_for, on_cube

VOXEL, TARGET, SIGMA = 1.05, 1.5, 3.0  # angstrom
MEAN, STD, PERCENTILE = 0.04, 0.09, 99.999


def density(edge: int, voxel_size: float) -> np.ndarray:
    """200 Gaussians in the middle half of the box, about whose voxel edge // 2 they stay when it changes."""
    rng = np.random.default_rng(0)
    atoms = rng.uniform(-0.2, 0.2, (200, 3)) * args.edge * VOXEL
    origin = np.full(3, -(edge // 2) * voxel_size)
    return gaussians(atoms, np.ones(200), np.full(200, SIGMA), (edge,) * 3, voxel_size, origin)


def scaled(voxels: np.ndarray) -> np.ndarray:
    """As ours: over the percentile, cut to [0, 1], in units of a prior."""
    scale = np.percentile(voxels, PERCENTILE)
    return (np.clip(voxels / scale, 0, 1) - MEAN) / STD


def ours(path: Path) -> np.ndarray:
    """With every check of the reader."""
    cube = on_cube(read_map(path), TARGET)
    scale = scale_of(cube.voxels, PERCENTILE, path)
    return ((cube.voxels / np.float32(scale)).clip(0, 1) - np.float32(MEAN)) / np.float32(STD)


def by_spline(order: int) -> Callable[[Path], np.ndarray]:
    """mrcfile and an affine transform about the centres."""

    def plain(path: Path) -> np.ndarray:
        with mrcfile.open(path) as mrc:
            voxels, step = np.asarray(mrc.data, np.float32), TARGET / float(mrc.voxel_size.x)
        edge = 2 * round(len(voxels) / step / 2)
        offset = len(voxels) // 2 - step * (edge // 2)
        return scaled(scipy.ndimage.affine_transform(voxels, [step] * 3, offset, (edge,) * 3, order=order))

    return plain


def by_transform(path: Path) -> np.ndarray:
    """mrcfile and the transform of the whole cube, on the box that ours chooses."""
    with mrcfile.open(path) as mrc:
        voxels = np.asarray(mrc.data, np.float32)
    grid = grid_for(len(voxels), VOXEL, TARGET)
    edge, more = grid.size, grid.padded - len(voxels)
    voxels = np.pad(voxels, more // 2)
    spectrum = scipy.fft.fftshift(scipy.fft.fftn(voxels))
    low = len(voxels) // 2 - edge // 2
    spectrum = spectrum[(slice(low, low + edge),) * 3]
    return scaled(scipy.fft.ifftn(scipy.fft.ifftshift(spectrum)).real * (edge / len(voxels)) ** 3)


WAYS: dict[str, Callable[[Path], np.ndarray]] = {
    "ours": ours,
    "mrcfile + ndimage, cubic splines": by_spline(3),
    "mrcfile + ndimage, quintic splines": by_spline(5),
    "mrcfile + scipy.fft of the cube": by_transform,
}


def error(found: np.ndarray) -> float:
    """Against the Gaussians on the new grid; in units of the map's maximum."""
    truth = scaled(density(len(found), TARGET))
    return float(np.abs(found - truth).max() * STD)


def measure(path: Path, repeats: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(repeats + 1):  # the first is not counted
        for name, way in WAYS.items():
            began = time.perf_counter()
            found = way(path)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
            elif path.suffix != ".gz":
                print(f"{name:36} error {error(found):.1e}, {found.shape[0]} voxels an edge")
    print(f"\n{path.name}, {path.stat().st_size / 1e6:.0f} MB: median [10 %, 90 %] of {repeats}")
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["ours"])]
        print(f"{name:36} {spread(taken)} s   {spread(ratios)} x ours")


def spread(values: list[float]) -> str:
    low, *_, high = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=256, help="voxels of the map")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mrcfile", "numpy", "scipy"))
    print(f"{versions}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}")
    print(f"{args.edge}^3 voxels of {VOXEL} angstrom to voxels of {TARGET}\n")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "map.mrc"
        save_map(plain, MapRecord(density(args.edge, VOXEL).astype(np.float32), (VOXEL,) * 3))
        packed = Path(folder) / "map.mrc.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes(), 6))
        for file in (plain, packed):
            measure(file, args.repeats)
