"""Density of atoms on a grid: separable sums of Gaussians, with widths from a resolution or from Peng's table.

Lengths are in angstrom, B factors in angstrom squared. Axes of arrays are z, y, x.
"""

import math
from collections.abc import Sequence

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


# ---- electron scattering

# f(k) = sum_i a_i exp(-b_i k^2 / 4) for k = 1 / d, in angstrom (Peng et al., Acta Cryst. A52:257, 1996, table of the
# International Tables C, 4.3.2.2): a_1..a_5, then b_1..b_5 in angstrom squared
PENG = {
    "H": ((0.0349, 0.1201, 0.1970, 0.0573, 0.1195), (0.5347, 3.5867, 12.3471, 18.9525, 38.6269)),
    "C": ((0.0893, 0.2563, 0.7570, 1.0487, 0.3575), (0.2465, 1.7100, 6.4094, 18.6113, 50.2523)),
    "N": ((0.1022, 0.3219, 0.7982, 0.8197, 0.1715), (0.2451, 1.7481, 6.1925, 17.3894, 48.1431)),
    "O": ((0.0974, 0.2921, 0.6910, 0.6990, 0.2039), (0.2067, 1.3815, 4.6943, 12.7105, 32.4726)),
    "P": ((0.2548, 0.6106, 1.4541, 2.3204, 0.8477), (0.2908, 1.8740, 8.5176, 24.3434, 63.2996)),
    "S": ((0.2497, 0.5628, 1.3899, 2.1865, 0.7715), (0.2681, 1.6711, 7.0267, 19.5377, 50.3888)),
}


def scattering(
    atoms: Float[np.ndarray, "atom 3"],
    elements: Sequence[str],
    b_factors: Float[np.ndarray, " atom"],
    occupancy: Float[np.ndarray, " atom"],
    shape: tuple[int, int, int],
    voxel_size: float,
    origin: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "z y x"]:
    """The electrostatic potential in units of the scattering factors, per angstrom cubed (times 47.878 in volts).

    V(r) = sum_i a_i (4 pi / (b_i + B))^(3/2) exp(-4 pi^2 r^2 / (b_i + B)) for an atom with the B factor B; a resolution
    is 4 res^2 of it. Raises KeyError for an element without an entry in `PENG`.
    """
    a, b = (np.array([PENG[element][which] for element in elements]) for which in (0, 1))
    b = b + b_factors[:, None]
    peaks = occupancy[:, None] * a * (4 * math.pi / b) ** 1.5
    sigmas = np.sqrt(b / 8) / math.pi
    return gaussians(np.repeat(atoms, 5, axis=0), peaks.ravel(), sigmas.ravel(), shape, voxel_size, origin)
