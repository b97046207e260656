"""Rotations of density: the 24 of the cube, exact on the grid, and any other by cubic splines, about the voxel N // 2.

Matrices act on (x, y, z), arrays have the axes z, y, x. Mirror images never occur: they would turn right-handed helices
into left-handed ones.
"""

import itertools

import numpy as np
from jaxtyping import Float
from scipy.ndimage import affine_transform


def _cube_rotations() -> Float[np.ndarray, "24 3 3"]:
    """The signed permutation matrices of determinant +1, the identity first."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.diag(signs)[:, order]
            if np.linalg.det(matrix) > 0:
                found.append(matrix)
    return np.stack(found)


CUBE = _cube_rotations()


def random_rotation(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """A rotation matrix drawn uniformly (Haar) from SO(3), as the unit quaternion of four normal numbers."""
    w, x, y, z = (q := rng.standard_normal(4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def turned(cube: Float[np.ndarray, "n n n"], matrix: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "n n n"]:
    """A cube with an odd edge under a rotation of `CUBE`: voxels change places and keep their values."""
    onto_zyx = matrix[::-1, ::-1]
    source = np.abs(onto_zyx).argmax(axis=1)
    moved = cube.transpose(tuple(source))
    return np.flip(moved, [axis for axis in range(3) if onto_zyx[axis, source[axis]] < 0])


def rotated(
    cube: Float[np.ndarray, "edge edge edge"], matrix: Float[np.ndarray, "3 3"], size: int
) -> Float[np.ndarray, "size size size"]:
    """The `size` voxels an edge about the centre of a cube that is rotated about its voxel edge // 2, by cubic splines.

    Outside of the cube is zero; what the result needs lies within sqrt(3) size / 2 of the centre.
    """
    inverse = matrix.T[::-1, ::-1]
    offset = cube.shape[0] // 2 - inverse @ np.full(3, size // 2)
    return affine_transform(cube, inverse, offset, (size,) * 3, order=3, mode="constant")
