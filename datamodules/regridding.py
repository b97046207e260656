"""Other grids for a map: cubes, and another voxel size by Fourier cropping or padding. Axes are z, y, x."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
from jaxtyping import Float, Float32

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the voxel size, for which a map is padded by up to `PADDING` of its edge
PADDING = 1.25
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
