"""Rotations turn density about the voxel N // 2 and never mirror it."""

import numpy as np
import pytest
from maps import blob
from scipy.ndimage import center_of_mass

from datamodules.atom_density import molmap
from datamodules.bundles import CHARGES, TORSIONS, backbone
from datamodules.rotations import CUBE, random_rotation, rotated, turned

NUMBERED = np.arange(27.0).reshape(3, 3, 3)


def test_there_are_24_and_they_are_a_group():
    results = {turned(NUMBERED, matrix).tobytes() for matrix in CUBE}
    assert len(results) == 24
    for first in CUBE:
        for second in CUBE:
            assert turned(turned(NUMBERED, second), first).tobytes() in results
    assert np.array_equal(turned(NUMBERED, CUBE[0]), NUMBERED)


def test_no_rotation_is_a_mirror_image():
    assert np.linalg.det(CUBE) == pytest.approx(1)
    mirrored = NUMBERED[::-1]
    assert all(not np.array_equal(turned(NUMBERED, matrix), mirrored) for matrix in CUBE)
    for seed in range(20):
        matrix = random_rotation(np.random.default_rng(seed))
        assert matrix @ matrix.T == pytest.approx(np.eye(3))
        assert np.linalg.det(matrix) == pytest.approx(1)


@pytest.mark.parametrize("number", range(24))
def test_density_goes_where_its_matrix_sends_it(number):
    """Both ways to rotate, against the rotated coordinates of a point (x, y, z)."""
    place = np.array([3.0, -2.0, 1.0])
    density = blob((17, 17, 17), 1.2, off=place[::-1])
    for rotation in (turned(density, CUBE[number]), rotated(density, CUBE[number], 17)):
        found = np.array(center_of_mass(rotation))[::-1] - 8
        assert found == pytest.approx(CUBE[number] @ place, abs=0.01)


@pytest.mark.parametrize("edge", [16, 17])
def test_any_rotation_turns_about_the_voxel_in_the_middle(edge):
    place, matrix = np.array([2.5, -1.5, 1.0]), random_rotation(np.random.default_rng(5))
    wide = blob((33, 33, 33), 1.5, off=place[::-1])
    found = np.array(center_of_mass(rotated(wide, matrix, edge)))[::-1] - edge // 2
    assert found == pytest.approx(matrix @ place, abs=0.02)
    middle = blob((33, 33, 33), 1.5)
    assert rotated(middle, matrix, edge)[(edge // 2,) * 3] == pytest.approx(1, abs=1e-3)


def test_a_helix_stays_right_handed():
    """The rotated density of a helix is the density of the rotated helix, not of its mirror image."""
    atoms = backbone(*TORSIONS["helix"], 12).reshape(-1, 3)
    atoms = atoms - atoms.mean(axis=0)

    def density(places: np.ndarray) -> np.ndarray:
        return molmap(places, np.tile(CHARGES, 12), 4.0, (33,) * 3, 1.0, np.full(3, -16.0))

    for matrix in CUBE[[1, 7, 15, 23]]:
        right, left = density(atoms @ matrix.T), density(atoms @ matrix.T * [1, 1, -1])
        found = turned(density(atoms), matrix)
        assert np.abs(found - right).max() < 1e-9 * right.max()
        assert np.abs(found - left).max() > 0.1 * right.max()


def test_correlation_of_shells_does_not_see_a_common_rotation():
    rng = np.random.default_rng(0)
    first = rng.standard_normal((17, 17, 17))
    second = first + rng.standard_normal((17, 17, 17))
    shells = np.rint(np.linalg.norm(np.stack(np.meshgrid(*[np.fft.fftfreq(17, 1 / 17)] * 3)), axis=0)).astype(int)

    def fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = np.fft.fftn(a), np.fft.fftn(b)
        terms = ((a * b.conj()).real, abs(a) ** 2, abs(b) ** 2)
        cross, *powers = (np.bincount(shells.ravel(), term.ravel())[1:9] for term in terms)
        return cross / np.sqrt(powers[0] * powers[1])

    for matrix in CUBE[[3, 11, 20]]:
        assert fsc(turned(first, matrix), turned(second, matrix)) == pytest.approx(fsc(first, second), abs=1e-6)
    assert fsc(turned(first, CUBE[3]), second).mean() < 0.3
