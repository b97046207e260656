"""Other voxel sizes keep values, mean and centre."""

import logging
from pathlib import Path

import numpy as np
import pytest
from maps import blob
from scipy.ndimage import center_of_mass

from datamodules.mrc import MapFormatError, MapRecord
from datamodules.regridding import Grid, back_from_cube, band_limited, grid_for, on_cube, padded, resampled

COARSE, FINE = (32, 2.25), (48, 1.5)


def gaussian(edge: int, voxel_size: float) -> np.ndarray:
    """sigma = 4 angstrom about the centre of a box of 72 angstrom."""
    return blob((edge,) * 3, 4 / voxel_size).astype(np.float64)


@pytest.mark.parametrize(("old", "new"), [(FINE, COARSE), (COARSE, FINE)])
def test_a_gaussian_is_resampled_to_what_it_is(old, new):
    found = resampled(gaussian(*old), (new[0],) * 3)
    assert np.abs(found - gaussian(*new)).max() < 1e-6
    assert found.mean(dtype=np.float64) == pytest.approx(gaussian(*old).mean(), abs=1e-9)
    assert np.abs(resampled(found, (old[0],) * 3) - gaussian(*old)).max() < 1e-6


def test_cropping_axis_by_axis_is_cropping_the_transform():
    voxels, edge, size = np.random.default_rng(0).standard_normal((12, 12, 12)), 12, 8
    spectrum = np.fft.fftshift(np.fft.fftn(voxels))
    low = (slice(edge // 2 - size // 2, edge // 2 + size // 2),) * 3
    kept = spectrum[low].copy()
    kept[0], kept[:, 0], kept[:, :, 0] = 0, 0, 0  # the unpaired Nyquist planes
    expected = np.fft.ifftn(np.fft.ifftshift(kept)).real * (size / edge) ** 3
    assert np.abs(resampled(voxels, (size,) * 3) - expected).max() < 1e-6


def test_an_odd_number_of_voxels_moves_the_centre_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        resampled(gaussian(*FINE), (32,) * 3)
        assert not caplog.records
        resampled(gaussian(*FINE), (33,) * 3)
    assert "moves the centre" in caplog.text
    assert pytest.approx(-1.09, abs=0.01) == 16 * 72 / 33 - 36  # angstrom


def test_grids_keep_the_size_of_the_box_and_come_close_with_a_little_padding():
    close = [(100, 1.05, 3.0), (97, 3.0, 1.5), (256, 0.8335, 1.5)]
    for edge, voxel_size, target in [*close, (47, 1.05, 3.0), (37, 5.395, 3.0)]:
        grid = grid_for(edge, voxel_size, target)
        assert grid.size * grid.voxel_size == pytest.approx(grid.padded * voxel_size, rel=1e-12)
        assert grid.padded % 2 == grid.size % 2 == 0
        assert edge <= grid.padded <= 1.25 * edge + 2
        assert grid.voxel_size == pytest.approx(target, rel=1e-3 if (edge, voxel_size, target) in close else 0.02)
    assert grid_for(64, 1.5, 1.5) == Grid(64, 64, 64, 1.5)


def test_padding_keeps_the_centre_and_is_undone_by_cutting():
    for shape in [(5, 6, 7), (8, 3, 4)]:
        voxels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        cube = padded(voxels, 12)
        assert cube[6, 6, 6] == voxels[tuple(n // 2 for n in shape)]
        assert np.array_equal(padded(cube, shape), voxels)
        assert cube.sum() == pytest.approx(voxels.sum(), rel=1e-5)


@pytest.mark.parametrize("shape", [(30, 34, 31), (40, 40, 40)])
@pytest.mark.parametrize("target", [1.0, 2.0])
def test_a_map_on_a_cube_is_where_it_was_and_comes_back(shape, target):
    record = MapRecord(blob(shape, 3.0, off=(2, -1, 0.5)), (1.5, 1.5, 1.5), nstart=(3, -4, 5))
    cube = on_cube(record, target)
    assert len(set(cube.voxels.shape)) == 1
    for grid in (record, cube):
        z, y, x = (place * grid.voxel_size for place in center_of_mass(grid.voxels))
        at = np.add(grid.offset, [x, y, z])
        expected = (np.array(shape[::-1]) // 2 + [0.5, -1, 2] + [3, -4, 5]) * 1.5
        assert at == pytest.approx(expected, abs=0.01)
    back = back_from_cube(cube, record, target)
    assert (back.nstart, back.voxel_sizes) == (record.nstart, record.voxel_sizes)
    assert np.abs(back.voxels - record.voxels).max() < 2e-3


def test_a_band_limit_takes_the_finer_waves_and_leaves_the_others():
    z, y, _ = np.meshgrid(*(np.arange(n) for n in (20, 18, 17)), indexing="ij")
    coarse, fine = np.cos(2 * np.pi * z * 4 / 20), np.cos(2 * np.pi * y * 5 / 18)  # periods of 10 and 7.2 angstrom
    limited = band_limited(MapRecord((coarse + fine).astype(np.float32), (2.0, 2.0, 2.0)), 4.0)
    assert np.abs(limited.voxels - coarse).max() < 1e-5
    assert limited.voxel_sizes == (2.0, 2.0, 2.0)


def test_voxels_that_are_no_cubes_become_cubes():
    voxels = blob((40, 40, 40), 3.0)[::2]  # z in steps of 3 angstrom
    record = MapRecord(voxels, (1.5, 1.5, 3.0))
    cube = on_cube(record, 1.5)
    assert cube.voxel_size == pytest.approx(1.5)
    assert np.abs(cube.voxels - blob((40, 40, 40), 3.0)).max() < 1e-3


def test_a_map_of_a_few_voxels_is_refused():
    with pytest.raises(MapFormatError, match=r"tiny\.mrc is 2 voxels of 3 A wide"):
        on_cube(MapRecord(blob((4, 4, 4)), (1.5,) * 3, path=Path("tiny.mrc")), 3.0)
