"""Restoring half maps from the command line: what is written, what is refused, and what goes on."""

import functools
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from datamodules.mrc import MapRecord, Remedy, read_map, save_map
from lightning_modules.cryo import prior
from lightning_modules.cryo.restoration import Restoration
from lightning_modules.cryo.unet import UNet
from tools import restore_map

SIDE, VOXEL = 20, 2.5
FAST = ("steps=2", "draws=2", "batch=4")


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """An untrained prior of 8^3 voxels of 5 angstrom."""
    folder = tmp_path_factory.mktemp("run") / "export"
    torch.manual_seed(0)

    maker = functools.partial(UNet, widths=[8, 16], time_width=16)
    prior.save(folder, prior.DensityPrior(maker(), mean=0.02, std=0.1, voxel_size=5.0, box=8), maker)
    return folder


def density() -> np.ndarray:
    """A few rods, in a box that is no cube."""
    z, y, x = np.meshgrid(*(np.arange(n) - n // 2 for n in (SIDE, SIDE, SIDE - 3)), indexing="ij")
    rods = (np.exp(-((z - 2) ** 2 + y**2) / 4 - x**2 / 30), np.exp(-(x**2 + y**2) / 4 - z**2 / 30))
    return sum(rods).astype(np.float32)


@pytest.fixture
def halves(tmp_path) -> list[Path]:
    """Half maps with a place in space, one of them compressed."""
    rng, paths = np.random.default_rng(0), [tmp_path / "half1.mrc", tmp_path / "half2.mrc.gz"]
    for path in paths:
        noisy = density() + 0.2 * rng.standard_normal(density().shape).astype(np.float32)
        save_map(path, MapRecord(noisy, (VOXEL,) * 3, origin=(10.0, -4.0, 7.5), nstart=(0, 0, 0)))
    return paths


@pytest.fixture
def told(export, halves, tmp_path, capsys):
    def told(*words: str, files: list[Path] | None = None, output: str = "out.mrc") -> tuple[int, str]:
        """Exit status and what stood on stderr."""
        arguments = [*(files or halves), "-o", tmp_path / output, "--prior", export, *words]
        status = restore_map.main([str(argument) for argument in arguments])
        return status, capsys.readouterr().err

    return told


@pytest.mark.parametrize("words", [(), ("task=wedge", "tilt=50"), ("task=anisotropic", "guidance=pigdm")])
def test_a_map_is_restored_on_its_grid_and_in_its_place(told, tmp_path, words):
    status, err = told(*FAST, *words)
    assert status == 0, err
    for name in ("out.mrc", "out_std.mrc"):
        assert mrcfile.validate(tmp_path / name)
        found = read_map(tmp_path / name)
        assert found.voxels.shape == (SIDE, SIDE, SIDE - 3)
        assert found.voxel_size == pytest.approx(VOXEL)
        assert found.offset == pytest.approx((10.0, -4.0, 7.5))
    assert read_map(tmp_path / "out_std.mrc").voxels.min() >= 0
    report = (tmp_path / "out.txt").read_text()
    assert "weight of the data" in report
    assert "not restored" in report  # the prior's voxels are wider
    assert "No resolution may be claimed" in report
    assert {path.name for path in tmp_path.glob("out*.png")} == {"out_fsc.png", "out_maps.png"}
    assert not list(tmp_path.glob(".out*")), "nothing half-written is left"
    assert "GB of memory" in " ".join(err.split())


def test_noise_finer_than_the_prior_is_not_spread_over_what_it_sees(export, tmp_path):
    """The box is padded along x, which would cut that noise off."""
    known, rng = prior.load(export), np.random.default_rng(1)
    edge = density().shape[2]
    finest = 5 * np.cos(2 * np.pi * 8 * np.arange(edge) / edge)  # a period of 5.3 angstrom: the prior has 10
    noise = 0.2 * rng.standard_normal((2, *density().shape))
    seen = []
    for sign in (0, 1):
        paths = [tmp_path / f"{sign}-{half}.mrc" for half in (1, 2)]
        for half, path in enumerate(paths):
            voxels = density() + noise[half] + sign * (-1) ** half * finest
            save_map(path, MapRecord(voxels.astype(np.float32), (VOXEL,) * 3))
        seen.append(restore_map.read_halves(paths, known, restore_map.Settings(scale="1")).volumes)
    assert (seen[0] - seen[1]).abs().max() < 1e-4


def test_an_interrupted_restoration_goes_on_to_the_same_map(told, tmp_path, monkeypatch):
    told(*FAST)
    whole = read_map(tmp_path / "out.mrc").voxels
    calls, original = [0], Restoration.noise

    def interrupted(self, *arguments):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Restoration, "noise", interrupted)
    monkeypatch.setattr(restore_map, "SAVED_EVERY", 0.0)
    status, err = told(*FAST, output="cut.mrc")
    assert (status, "goes on from here" in err) == (130, True)
    assert not (tmp_path / "cut.mrc").exists()
    monkeypatch.setattr(Restoration, "noise", original)
    status, err = told(*FAST, output="cut.mrc")
    assert "going on after" in err
    assert status == 0
    assert np.array_equal(read_map(tmp_path / "cut.mrc").voxels, whole)


def test_every_remedy_of_the_reader_has_words_here():
    assert set(restore_map.REMEDIES) == set(Remedy)


def test_bad_input_is_one_sentence(told, tmp_path, halves):
    first = halves[0]
    moved, small, other, hole, sizeless = (
        tmp_path / name for name in ("moved.mrc", "small.mrc", "other.txt", "hole.mrc", "sizeless.mrc")
    )
    for path, voxels, size in ((hole, np.where(density() > 0.9, np.nan, density()), VOXEL), (sizeless, density(), 0)):
        with mrcfile.new(path) as file:
            file.set_data(voxels.astype(np.float32))
            file.voxel_size = size
    save_map(moved, MapRecord(density(), (VOXEL * 1.1,) * 3))
    save_map(small, MapRecord(density()[:-2], (VOXEL,) * 3, origin=(10.0, -4.0, 7.5)))
    other.write_text("no map")
    for words, files, sentence in (
        (("task=sharpen",), None, "task=sharpen: there are denoise, anisotropic, wedge"),
        (("steps=few",), None, "steps=few: steps is a whole number, such as steps=100"),
        (("draw=4",), None, "draw=4: words are name=value, with task"),
        (("task=wedge", "tilt=100"), None, "tilt=100.0 is the largest tilt"),
        (("scale=-1",), None, "scale=-1 must be positive, or auto"),
        (("sampler=frozen_walk",), None, "sampler=frozen_walk: there are"),
        ((), [first, first], "are the same map"),
        ((), [first, moved], "differ in voxel size"),
        ((), [first, small], "differ in shape"),
        ((), [first, other], "other.txt"),
        ((), [first, tmp_path / "none.mrc"], "none.mrc"),
        ((), [first, hole], "NaN or infinite: write 0 or the density that belongs there"),
        ((), [first, sizeless], "has no voxel size (cell (0, 0, 0) A): set it in the header, or give voxel_size"),
    ):
        status, err = told(*words, files=files)
        assert status == 1, words
        assert sentence in err
        assert err.strip().count("\n") == 0, err
    status, err = told(output="out.png")
    assert (status, "a map's name ends in .mrc" in err) == (1, True)
    assert not list(tmp_path.glob("out*"))


def test_a_folder_without_a_prior_is_named(halves, tmp_path, capsys):
    arguments = [*halves, "-o", tmp_path / "out.mrc", "--prior", tmp_path]
    assert restore_map.main([str(argument) for argument in arguments]) == 1
    assert "holds no prior" in capsys.readouterr().err
