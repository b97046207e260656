"""Generated protein backbones: bundles of helices and strands, ideal in bonds, angles and handedness.

Chains are grown atom by atom from torsion angles (NeRF, Parsons et al., J. Comput. Chem. 26:1063, 2005). Lengths are in
angstrom.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from datamodules.rotations import random_rotation

TORSIONS = {"helix": (-57.8, -47.0), "strand": (-119.0, 113.0)}  # phi, psi in degrees; omega is 180
RESIDUES = {"helix": (12, 25), "strand": (6, 10)}
HELICES = 0.7  # of the elements
ELEMENTS = (3, 8)
TILT = 0.35  # rad, standard deviation of an element's angle with the bundle's axis
SPREAD, SPACING = 10.0, 8.5  # of the elements' centres across the axis: standard deviation, and least distance
ATOMS = ("N", "CA", "C", "O", "CB")
CHARGES = np.array([7, 6, 6, 8, 6])


def placed(
    a: Float[np.ndarray, "3"],
    b: Float[np.ndarray, "3"],
    c: Float[np.ndarray, "3"],
    length: float,
    angle: float,
    torsion: float,
) -> Float[np.ndarray, "3"]:
    """The atom bonded to `c` at a bond angle with `b` and a torsion about b-c with `a`, both in degrees."""
    angle, torsion = np.radians([angle, torsion])
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    inward = np.cross(normal, along)
    return c + length * (-np.cos(angle) * along + np.sin(angle) * (np.cos(torsion) * inward + np.sin(torsion) * normal))


def backbone(phi: float, psi: float, residues: int) -> Float[np.ndarray, "residues 5 3"]:
    """Atoms N, CA, C, O, CB of a chain of L-amino acids whose torsions (degrees) are the same everywhere."""
    n, ca = np.zeros(3), np.array([1.458, 0.0, 0.0])
    c = ca + 1.525 * np.array([-np.cos(np.radians(111.0)), np.sin(np.radians(111.0)), 0.0])
    chain = []
    for _ in range(residues):
        o = placed(n, ca, c, 1.231, 120.4, psi + 180)
        cb = placed(c, n, ca, 1.53, 110.4, -122.6)
        chain.append([n, ca, c, o, cb])
        n_next = placed(n, ca, c, 1.329, 116.9, psi)
        ca_next = placed(ca, c, n_next, 1.458, 121.7, 180.0)
        n, ca, c = n_next, ca_next, placed(c, n_next, ca_next, 1.525, 111.0, phi)
    return np.array(chain)


@lru_cache(maxsize=64)
def _element(kind: str, residues: int) -> Float[np.ndarray, "residues 5 3"]:
    """A helix or strand about the origin whose first principal axis, from N to C, is z."""
    atoms = backbone(*TORSIONS[kind], residues)
    atoms = atoms - atoms[:, 1].mean(axis=0)
    axes = np.linalg.svd(atoms[:, 1])[2]
    z = axes[0] * np.sign(axes[0] @ (atoms[-1, 1] - atoms[0, 1]))
    return atoms @ np.stack([axes[1], np.cross(z, axes[1]), z], axis=1)


def bundle(rng: np.random.Generator) -> tuple[Float[np.ndarray, "atom 3"], Int[np.ndarray, " atom"]]:
    """Coordinates (x, y, z) about the origin and atomic numbers of 3 to 8 helices and strands side by side.

    They are roughly parallel or antiparallel, and the whole is rotated at random.
    """
    centres = _centres(rng, int(rng.integers(*ELEMENTS, endpoint=True)))
    elements = [_oriented(rng) + np.append(centre, 0.0) for centre in centres]
    atoms = np.concatenate([element.reshape(-1, 3) for element in elements])
    atoms = (atoms - atoms.mean(axis=0)) @ random_rotation(rng).T
    return atoms, np.tile(CHARGES, len(atoms) // len(CHARGES))


def _centres(rng: np.random.Generator, count: int) -> list[Float[np.ndarray, "2"]]:
    """Centres across the axis, each drawn again until it is far enough from the ones before."""
    centres: list[np.ndarray] = []
    while len(centres) < count:
        centre = rng.normal(0.0, SPREAD, 2)
        if all(np.linalg.norm(centre - other) >= SPACING for other in centres):
            centres.append(centre)
    return centres


def _oriented(rng: np.random.Generator) -> Float[np.ndarray, "residues 5 3"]:
    """An element with a random length, turn about its axis, direction and tilt."""
    kind = "helix" if rng.random() < HELICES else "strand"
    element = _element(kind, int(rng.integers(*RESIDUES[kind], endpoint=True)))
    down = np.pi * rng.integers(2)
    turn, tilt, azimuth = rng.uniform(0, 2 * np.pi), rng.normal(0.0, TILT), rng.uniform(0, 2 * np.pi)
    return element @ (_about_z(azimuth) @ _about_x(tilt + down) @ _about_z(turn)).T


def _about_z(angle: float) -> Float[np.ndarray, "3 3"]:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _about_x(angle: float) -> Float[np.ndarray, "3 3"]:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
