"""Density of atoms on a grid: separable sums of Gaussians, with widths from a resolution or from Peng's table.

Lengths are in angstrom, B factors in angstrom squared. Axes of arrays are z, y, x.
"""

import math

import numpy as np
from jaxtyping import Float, Int

ATOMS_AT_ONCE = 512


def gaussians(
    atoms: Float[np.ndarray, "atom 3"],
    peaks: Float[np.ndarray, " atom"],
    sigmas: Float[np.ndarray, " atom"],
    shape: tuple[int, int, int],
    voxel_size: float,
    origin: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "z y x"]:
    """Sum over atoms (x, y, z) of peak * exp(-r^2 / 2 sigma^2) at the voxels; voxel (0, 0, 0) is at `origin`."""
    density = np.zeros(shape)
    flat = density.reshape(shape[0], -1)
    for begin in range(0, len(atoms), ATOMS_AT_ONCE):
        some = slice(begin, begin + ATOMS_AT_ONCE)
        z, y, x = (_profiles(atoms[some, 2 - i], sigmas[some], shape[i], voxel_size, origin[2 - i]) for i in range(3))
        planes = (y[:, :, None] * x[:, None, :]).reshape(len(y), -1)
        flat += (peaks[some, None] * z).T @ planes
    return density


def _profiles(
    places: Float[np.ndarray, " atom"], sigmas: Float[np.ndarray, " atom"], size: int, voxel_size: float, first: float
) -> Float[np.ndarray, "atom size"]:
    grid = first + voxel_size * np.arange(size)
    return np.exp(-0.5 * ((grid - places[:, None]) / sigmas[:, None]) ** 2)


def width(resolution: float) -> float:
    """Standard deviation of a Gaussian whose Fourier transform falls to 1/e at 1 / resolution: res / (pi sqrt 2)."""
    return resolution / (math.pi * math.sqrt(2))


def molmap(
    atoms: Float[np.ndarray, "atom 3"],
    charges: Int[np.ndarray, " atom"],
    resolution: float,
    shape: tuple[int, int, int],
    voxel_size: float,
    origin: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "z y x"]:
    """A Gaussian of width `width(resolution)` and weight Z for every atom, as ChimeraX's molmap."""
    sigmas = np.full(len(atoms), width(resolution))
    peaks = charges / ((2 * math.pi) ** 1.5 * sigmas**3)
    return gaussians(atoms, peaks, sigmas, shape, voxel_size, origin)
