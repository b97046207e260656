"""Densities of atoms against closed forms and against gemmi."""

import math

import numpy as np
import pytest

from datamodules.atom_density import PENG, gaussians, molmap, scattering, width

ATOMS = np.array([[14.0, 16.0, 16.0], [16.3, 15.2, 16.9], [17.0, 18.4, 15.0]])
ELEMENTS = ["N", "C", "O"]


def potential(b_iso: float = 20.0) -> np.ndarray:
    return scattering(ATOMS, ELEMENTS, np.full(3, b_iso), np.ones(3), (32, 32, 32), 1.0, np.zeros(3))


def test_three_atoms_scatter_as_in_gemmi():
    gemmi = pytest.importorskip("gemmi")
    model = gemmi.Model("1") if isinstance(gemmi.Model("1"), gemmi.Model) else gemmi.Model(1)
    residue = gemmi.Residue()
    for place, element in zip(ATOMS, ELEMENTS):
        atom = gemmi.Atom()
        atom.element, atom.pos, atom.b_iso, atom.occ = gemmi.Element(element), gemmi.Position(*place), 20.0, 1.0
        residue.add_atom(atom)
    chain = gemmi.Chain("A")
    chain.add_residue(residue)
    model.add_chain(chain)
    calculator = gemmi.DensityCalculatorE()
    calculator.d_min, calculator.rate, calculator.cutoff = 2.0, 1.0, 1e-7
    calculator.grid.unit_cell = gemmi.UnitCell(32, 32, 32, 90, 90, 90)
    calculator.grid.spacegroup = gemmi.SpaceGroup("P1")
    calculator.grid.set_size(32, 32, 32)
    calculator.add_model_density_to_grid(model)
    theirs = np.array(calculator.grid, copy=False).transpose()
    ours = potential()
    assert ours.max() == pytest.approx(0.6307, abs=1e-4)
    assert np.abs(ours - theirs).max() < 2e-6


def test_a_potential_sums_to_the_forward_scattering():
    forward = [sum(PENG[element][0]) for element in ELEMENTS]
    assert sum(forward) == pytest.approx(6.7057, abs=1e-4)
    assert potential().sum() == pytest.approx(sum(forward), rel=0.01)


@pytest.mark.parametrize(
    ("element", "forward"), {"H": 0.5288, "C": 2.5088, "N": 2.2135, "O": 1.9834, "P": 5.4876, "S": 5.1604}.items()
)
def test_factors_have_their_tabulated_sum(element, forward):
    assert sum(PENG[element][0]) == pytest.approx(forward, abs=1.5e-4)


@pytest.mark.parametrize("resolution", [6.0, 8.0])
def test_molmap_falls_to_one_over_e_at_its_resolution(resolution):
    edge, voxel_size = 48, 1.0
    density = molmap(np.zeros((1, 3)), np.array([6]), resolution, (edge,) * 3, voxel_size, np.full(3, -24.0))
    assert density.sum() == pytest.approx(6, rel=1e-6)
    spectrum = np.abs(np.fft.fftn(density))
    at_resolution = spectrum[round(edge * voxel_size / resolution), 0, 0]
    assert at_resolution / spectrum[0, 0, 0] == pytest.approx(1 / math.e, abs=1e-3)
    # as a B factor: 8 pi^2 sigma^2 = 4 resolution^2
    assert 8 * math.pi**2 * width(resolution) ** 2 == pytest.approx(4 * resolution**2)


def test_many_atoms_are_the_sum_of_each():
    rng = np.random.default_rng(0)
    atoms, peaks, sigmas = rng.uniform(0, 10, (600, 3)), rng.uniform(1, 2, 600), rng.uniform(0.5, 2, 600)
    shape, origin = (4, 5, 6), np.array([1.0, 2.0, 3.0])
    z, y, x = np.meshgrid(*(np.arange(n) * 1.5 for n in shape), indexing="ij")
    places = np.stack([x, y, z], axis=-1) + origin
    squares = ((places[..., None, :] - atoms) ** 2).sum(axis=-1)
    expected = (peaks * np.exp(-0.5 * squares / sigmas**2)).sum(axis=-1)
    assert gaussians(atoms, peaks, sigmas, shape, 1.5, origin) == pytest.approx(expected, rel=1e-12)
