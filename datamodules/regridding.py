"""Other grids for a map: cubes, and another voxel size by Fourier cropping or padding. Axes are z, y, x."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
from jaxtyping import Float, Float32

from datamodules.mrc import MapFormatError, MapRecord, NoDensityError, Remedy

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the voxel size, for which a map is padded by up to `PADDING` of its edge
PADDING = 1.25
ISOTROPIC = 2e-3  # largest relative difference of voxel sizes that counts as none
TINY_EDGE = 8
EXACT_EDGE = 128  # up to here transforms are computed in float64


@dataclass(frozen=True)
class Grid:
    """A map of `edge` voxels padded to `padded` and resampled to `size` of `voxel_size` angstrom, both of them even."""

    edge: int
    padded: int
    size: int
    voxel_size: float


def grid_for(edge: int, voxel_size: float, target: float) -> Grid:
    """The grid whose voxels come closest to the target, in angstrom.

    The physical size of the box stays what it is, size * voxel_size' = padded * voxel_size, so only some voxel sizes
    can be had. The smallest padding up to a quarter is taken that comes within 1e-3 of the target; without one, the
    best of them. Even sizes keep the centre, voxel N // 2, where it is.
    """
    smallest = edge + edge % 2
    candidates = [_grid(edge, padded, voxel_size, target) for padded in range(smallest, int(PADDING * edge) + 3, 2)]
    close = (grid for grid in candidates if abs(grid.voxel_size / target - 1) < TOLERANCE)
    return next(close, None) or min(candidates, key=lambda grid: abs(grid.voxel_size / target - 1))


def _grid(edge: int, padded: int, voxel_size: float, target: float) -> Grid:
    size = max(2, 2 * round(padded * voxel_size / target / 2))
    return Grid(edge, padded, size, padded * voxel_size / size)


def on_cube(record: MapRecord, voxel_size: float) -> MapRecord:
    """The map in a cube with an even edge about the same centre, at the voxel size next to the one asked for.

    Raises MapFormatError for a map that is no more than a few voxels wide.
    """
    grids = _grids(record, voxel_size)
    true = [grid.voxel_size for grid in grids]
    if max(true) / min(true) - 1 > ISOTROPIC:
        raise NoDensityError(
            record.path,
            f"cannot be brought to cubic voxels of {voxel_size:g} A, only to {true}",
            Remedy.OTHER_GRID,
        )
    mean = sum(true) / 3
    if (smallest := min(grid.size for grid in grids)) < TINY_EDGE:
        raise MapFormatError(
            record.path, f"is {smallest} voxels of {mean:.4g} A wide, too little for a map", Remedy.FINER
        )
    if abs(mean / voxel_size - 1) > TOLERANCE:
        log.warning("%s gets voxels of %.5g A, the next that its box allows to %g", record.path, mean, voxel_size)
    if record.voxel_size > 1.5 * voxel_size:
        log.warning("%s has voxels of %.4g A: there is nothing finer in it", record.path, record.voxel_size)
    sizes = [grid.size for grid in grids]
    cube = padded(resampled(padded(record.voxels, [grid.padded for grid in grids]), sizes), cubic_edge(sizes))
    moved = zip(record.offset, record.voxel_sizes, record.voxels.shape[::-1])
    x, y, z = (offset + size * (edge // 2) - mean * (len(cube) // 2) for offset, size, edge in moved)
    return replace(record, voxels=cube, voxel_sizes=(mean,) * 3, origin=(x, y, z), nstart=(0, 0, 0))


def back_from_cube(cube: MapRecord, record: MapRecord, voxel_size: float) -> MapRecord:
    """What `on_cube(record, voxel_size)` made, or what became of it, on the grid and in the place of `record`."""
    grids = _grids(record, voxel_size)
    inner = padded(cube.voxels, [grid.size for grid in grids])
    voxels = padded(resampled(inner, [grid.padded for grid in grids]), record.voxels.shape)
    return replace(record, voxels=voxels)


def band_limited(record: MapRecord, voxel_size: float) -> MapRecord:
    """The map on its own grid without what is finer, along an axis, than two voxels of `voxel_size` angstrom.

    For noisy maps before they are padded: where noise ends sharply at the box it is spread over all frequencies.
    """
    found = record.voxels.astype(np.float64 if max(record.voxels.shape) <= EXACT_EDGE else np.float32)
    for axis, (edge, size) in enumerate(zip(found.shape, record.voxel_sizes[::-1])):
        spectrum = scipy.fft.rfft(found, axis=axis)
        finer = scipy.fft.rfftfreq(edge, size) > 0.5 / voxel_size
        spectrum[(slice(None),) * axis + (finer,)] = 0
        found = scipy.fft.irfft(spectrum, edge, axis=axis)
    return replace(record, voxels=found.astype(np.float32))


def _grids(record: MapRecord, target: float) -> list[Grid]:
    """One for each axis, z first; all the same where voxels are cubes."""
    shape, sizes = record.voxels.shape, record.voxel_sizes[::-1]
    if max(sizes) / min(sizes) - 1 < ISOTROPIC:
        return [replace(grid_for(cubic_edge(shape), record.voxel_size, target), edge=edge) for edge in shape]
    return [grid_for(edge, size, target) for edge, size in zip(shape, sizes)]


def pads(edge: int, size: int) -> tuple[int, int]:
    """Voxels to add before and behind (negative: to cut off) so that voxel edge // 2 becomes voxel size // 2."""
    before = size // 2 - edge // 2
    return before, size - edge - before


def padded(voxels: Float[np.ndarray, "z y x"], size: int | Sequence[int]) -> Float[np.ndarray, "z2 y2 x2"]:
    """A larger box, or a smaller one, about the same centre; zeros where there was nothing."""
    sizes = (size,) * 3 if isinstance(size, int) else tuple(size)
    before = [pads(edge, new)[0] for edge, new in zip(voxels.shape, sizes)]
    if sizes == voxels.shape:
        return voxels
    found = np.zeros(sizes, voxels.dtype)
    inside = tuple(slice(max(b, 0), max(b, 0) + min(n, m)) for b, n, m in zip(before, voxels.shape, sizes))
    taken = tuple(slice(max(-b, 0), max(-b, 0) + min(n, m)) for b, n, m in zip(before, voxels.shape, sizes))
    found[inside] = voxels[taken]
    return found


def cubic_edge(shape: Sequence[int]) -> int:
    """The next even number that is no smaller than any edge."""
    return max(shape) + max(shape) % 2


def resampled(voxels: Float[np.ndarray, "z y x"], shape: Sequence[int]) -> Float32[np.ndarray, "z2 y2 x2"]:
    """The band-limited map through the same box with another number of voxels; values and mean stay what they are.

    The Fourier transform is cropped or padded with zeros, axis by axis, without its unpaired Nyquist term. Voxel 0
    stays where it is, and so does the centre N // 2 where both numbers are even; otherwise a warning says by how much
    it moves. In float64 up to 128 voxels an edge, above in float32.
    """
    moved = [old * (new // 2) / new - old // 2 for old, new in zip(voxels.shape, shape)]
    if any(moved):
        log.warning("resampling to %s voxels moves the centre by %s old ones: take even numbers", tuple(shape), moved)
    found = voxels.astype(np.float64 if max(voxels.shape) <= EXACT_EDGE else np.float32)
    # axes that shrink first, so that the others have less to do
    for axis in sorted(range(3), key=lambda axis: shape[axis] / voxels.shape[axis]):
        found = _resampled_axis(found, axis, shape[axis])
    return np.ascontiguousarray(found, np.float32)


def _resampled_axis(voxels: Float[np.ndarray, "z y x"], axis: int, size: int) -> Float[np.ndarray, "z2 y2 x2"]:
    edge = voxels.shape[axis]
    if size == edge:
        return voxels
    kept = (min(edge, size) + 1) // 2  # the Nyquist term of the smaller of both is at `kept` where it is even
    spectrum = scipy.fft.rfft(voxels, axis=axis)
    if size > edge and edge % 2 == 0:
        index = (slice(None),) * axis
        spectrum[(*index, kept)] *= 0.5  # it is its own partner here, and has one on the finer grid
        kept += 1
    low = spectrum[(slice(None),) * axis + (slice(0, kept),)]
    return scipy.fft.irfft(low, size, axis=axis) * voxels.dtype.type(size / edge)
