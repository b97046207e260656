"""Generated backbones have the geometry of proteins."""

import numpy as np
import pytest

from datamodules.bundles import TORSIONS, backbone, bundle

N, CA, C, O_, CB = range(5)


def mean_distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second, axis=-1).mean())


def test_a_helix_has_the_distances_of_an_alpha_helix():
    helix = backbone(*TORSIONS["helix"], 40)
    ca = helix[:, CA]
    for step, distance in {1: 3.81, 3: 5.22, 4: 6.34}.items():
        assert mean_distance(ca[step:], ca[:-step]) == pytest.approx(distance, abs=0.02)
    assert mean_distance(helix[:-4, O_], helix[4:, N]) == pytest.approx(3.06, abs=0.02)


def test_a_helix_winds_to_the_right_at_its_rise_radius_and_turn():
    ca = backbone(*TORSIONS["helix"], 40)[:, CA]
    # second differences point to the axis, and two of them span the turn between residues
    inward = ca[2:] + ca[:-2] - 2 * ca[1:-1]
    axis = np.cross(inward[:-1], inward[1:]).mean(axis=0)
    axis /= np.linalg.norm(axis)
    rises = (ca[1:] - ca[:-1]) @ axis
    assert rises.mean() == pytest.approx(1.545, abs=0.02)  # along the sense of rotation: right-handed
    unit = inward / np.linalg.norm(inward, axis=1, keepdims=True)
    turn = np.arccos((unit[1:] * unit[:-1]).sum(axis=1)).mean()
    assert 2 * np.pi / turn == pytest.approx(3.63, abs=0.02)
    assert np.linalg.norm(inward, axis=1).mean() / (2 - 2 * np.cos(turn)) == pytest.approx(2.30, abs=0.02)


def test_a_strand_rises_by_3_28_angstrom_a_residue():
    ca = backbone(*TORSIONS["strand"], 11)[:, CA]
    assert np.linalg.norm(ca[10] - ca[0]) / 10 == pytest.approx(3.28, abs=0.02)


def volumes(atoms: np.ndarray) -> np.ndarray:
    """(N - CA) x (C - CA) . (CB - CA), angstrom cubed: positive for L-amino acids."""
    n, c, cb = (atoms[:, i] - atoms[:, CA] for i in (N, C, CB))
    return (np.cross(n, c) * cb).sum(axis=1)


@pytest.mark.parametrize("kind", TORSIONS)
def test_residues_are_l_amino_acids(kind):
    assert volumes(backbone(*TORSIONS[kind], 10)) == pytest.approx(2.55, abs=0.06)


def test_bundles_keep_their_handedness_and_are_about_the_origin():
    for seed in range(20):
        atoms, charges = bundle(np.random.default_rng(seed))
        residues = atoms.reshape(-1, 5, 3)
        assert volumes(residues) == pytest.approx(2.55, abs=0.06)
        assert charges[:5].tolist() == [7, 6, 6, 8, 6]
        assert len(charges) == len(atoms)
        assert 3 * 6 <= len(residues) <= 8 * 25
        assert np.abs(atoms.mean(axis=0)).max() < 1e-9


def test_a_bundle_is_a_function_of_its_generator():
    first, again, other = (bundle(np.random.default_rng(seed))[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.allclose(first, other)
