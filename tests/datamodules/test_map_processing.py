"""From files to grids: scale, target, near density; kept on the disk as long as files and settings are the same."""

import os
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from maps import blob, real, write

from datamodules import map_cache
from datamodules.map_cache import cached, file_digest
from datamodules.map_entries import Entry
from datamodules.map_processing import Processing, process, scale_of
from datamodules.mrc import MapFormatError

SETTINGS = Processing(
    voxel_size=3.0, box=12, target="map", percentile=99.999, clip=True, threshold=0.1, dilate=3, nan_policy="error",
    allow_anisotropic=False, assume_voxel_size=None, precision="float32",
)  # fmt: skip
NOISE = np.random.default_rng(0).standard_normal((2, 40, 40, 40)).astype(np.float32) * 0.05


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """A map with two noisy halves, 40^3 voxels of 3 angstrom."""
    clean = 7 * blob((40, 40, 40), 3.0, off=(4, 0, -3))
    halves = [write(tmp_path / f"h{i}.mrc", clean + 7 * NOISE[i], 3.0) for i in (0, 1)]
    return Entry("e", write(tmp_path / "e.mrc", clean - 0.5, 3.0), *halves, cluster="e")


def test_cryofm1_clips_to_its_percentile_and_cryofm2_keeps_the_noise(entry):
    density = process(entry, SETTINGS).grids["density"]
    assert (density.min(), density.max()) == (0, 1)
    made = process(entry, replace(SETTINGS, target="half2", clip=False))
    raw = made.grids["half2"] * np.float32(made.scale)
    assert raw == pytest.approx(7 * (blob((40, 40, 40), 3.0, off=(4, 0, -3)) + NOISE[1]), abs=1e-4)
    assert np.array_equal(made.grids["density"], made.grids["half2"])
    assert made.grids["density"].min() < -0.1
    mean = process(entry, replace(SETTINGS, target="halves", clip=False)).grids
    assert mean["density"] == pytest.approx((mean["half1"] + mean["half2"]) / 2, abs=1e-6)


def test_the_scale_is_a_percentile_and_of_small_boxes_a_median():
    hot = NOISE[0].copy()
    hot[3, 3, 3] = 100
    assert scale_of(hot, 99.999, "m") == pytest.approx(np.percentile(hot, 99.999))
    small = blob((20, 20, 20), 3.0)
    small[2, 2, 2] = 100
    assert scale_of(small, 99.999, "m") == pytest.approx(1, abs=0.15)


def test_a_map_without_positive_density_is_refused_and_an_inverted_one_is_doubted(caplog):
    with pytest.raises(MapFormatError, match=r"m\.mrc has no positive density"):
        scale_of(-1 - blob((40, 40, 40)), 99.999, "m.mrc")
    scale_of(0.01 * blob((40, 40, 40)) - blob((40, 40, 40), off=(9, 9, 9)), 99.999, "m.mrc")
    assert "is it inverted?" in caplog.text


def test_boxes_are_no_smaller_than_two_crops(entry):
    assert process(entry, replace(SETTINGS, box=32)).grids["density"].shape == (64, 64, 64)
    assert process(entry, SETTINGS).grids["density"].shape == (40, 40, 40)


def test_near_density_is_above_the_contour_level_where_there_is_one(entry):
    # around a Gaussian's centre, by how far it is above the level: within sigma sqrt(2 log(1 / level))
    for contour, radius in [(None, 3 * np.sqrt(2 * np.log(7 / 1.15))), (3.0, 3 * np.sqrt(2 * np.log(2)))]:
        occupied = process(replace(entry, contour=contour), replace(SETTINGS, dilate=0)).grids["occupied"]
        assert occupied.sum() == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.05)
    grown = process(entry, SETTINGS).grids["occupied"]
    assert grown.sum() > 2 * process(entry, replace(SETTINGS, dilate=0)).grids["occupied"].sum()


def test_what_a_target_needs_and_lacks_is_said(entry):
    with pytest.raises(MapFormatError, match=r"e\.mrc has no half1 beside it, which data\.target=halves needs"):
        process(replace(entry, half1=None, half2=None), replace(SETTINGS, target="halves"))


# ---- the cache


def refuse(*_) -> None:
    raise AssertionError("processed again")


def test_a_map_is_processed_once_and_again_for_other_settings_or_another_file(entry, tmp_path, monkeypatch):
    first = cached(entry, SETTINGS, tmp_path / "cache")
    assert np.array_equal(first.grids()["density"], process(entry, SETTINGS).grids["density"])
    with monkeypatch.context() as context:
        context.setattr(map_cache, "process", refuse)
        again = cached(replace(entry, id="renamed"), SETTINGS, tmp_path / "cache")
        assert (again.folder, again.scale, again.voxel_size) == (first.folder, first.scale, 3.0)
        for other in (replace(SETTINGS, dilate=1), replace(SETTINGS, precision="float16")):
            with pytest.raises(AssertionError, match="processed again"):
                cached(entry, other, tmp_path / "cache")
        os.utime(entry.map, ns=(time.time_ns(), time.time_ns() + 10))  # touched, with the same bytes
        assert cached(entry, SETTINGS, tmp_path / "cache").folder == first.folder
    write(entry.map, 3 * blob((40, 40, 40), 2.0), 3.0)
    assert cached(entry, SETTINGS, tmp_path / "cache").folder != first.folder


def test_a_damaged_or_unfinished_cache_is_made_anew(entry, tmp_path, caplog):
    folder = cached(entry, SETTINGS, tmp_path / "cache").folder
    (folder / "density.npy").write_bytes(b"")
    assert cached(entry, SETTINGS, tmp_path / "cache").grids()["density"].max() == 1
    (folder / "map.json").unlink()
    assert cached(entry, SETTINGS, tmp_path / "cache").grids()["density"].max() == 1
    assert caplog.text.count("made anew") == 2


def test_what_fails_leaves_nothing_in_the_cache(entry, tmp_path):
    entry.map.write_bytes(entry.map.read_bytes()[:5000])
    with pytest.raises(MapFormatError, match="cut short"):
        cached(entry, SETTINGS, tmp_path / "cache")
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {"digests", "locks"}


def _make(entry: Entry, cache: Path, results) -> None:
    results.put(str(cached(entry, SETTINGS, cache).folder))


def test_two_processes_make_one_map(entry, tmp_path):
    context = get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_make, args=(entry, tmp_path / "cache", results)) for _ in range(2)]
    for process_ in both:
        process_.start()
    assert results.get(timeout=60) == results.get(timeout=60)
    for process_ in both:
        process_.join()
    assert len(list((tmp_path / "cache").glob("*/map.json"))) == 1


def test_a_digest_follows_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    first = file_digest(tmp_path / "a", tmp_path / "cache")
    (tmp_path / "a").write_bytes(b"22")
    assert file_digest(tmp_path / "a", tmp_path / "cache") != first


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_real_map_is_cut_to_cubes_of_another_voxel_size(tmp_path, precision):
    entry = Entry("emd_3488", real("maps/emd_3488.map.gz"), cluster="EMD-3488")
    made = process(entry, replace(SETTINGS, precision=precision))
    assert made.grids["density"].dtype == precision
    assert made.voxel_size == pytest.approx(3.0)
    assert made.grids["density"].shape == (42, 42, 42)  # 120 voxels of 1.05 angstrom
    assert 0.2 < made.scale < 0.7
