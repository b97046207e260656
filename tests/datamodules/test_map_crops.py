"""What a step sees depends on the seed and the step alone, and lies within the map, near density."""

from collections import Counter

import numpy as np
import pytest
import torch
from maps import blob, write
from torch.utils.data import DataLoader

from datamodules.map_cache import CachedMap, cached
from datamodules.map_crops import (
    Cook,
    Cropping,
    EvalCrops,
    Normalisation,
    TrainCrops,
    WholeMap,
    crop,
    cut,
    measured,
    random_stream,
)
from datamodules.map_entries import Entry
from datamodules.map_processing import Processing
from datamodules.simulated_maps import bundle_maps

UNITS = Normalisation(0.04, 0.09)
SETTINGS = Processing(
    voxel_size=3.0, box=9, target="map", percentile=99.999, clip=True, threshold=0.1, dilate=1, nan_policy="error",
    allow_anisotropic=False, assume_voxel_size=None, precision="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def volume(tmp_path_factory) -> CachedMap:
    """32^3 voxels with two blobs beside the centre."""
    folder = tmp_path_factory.mktemp("volume")
    density = blob((32, 32, 32), 2.0, off=(6, 4, -5)) + blob((32, 32, 32), 1.5, off=(-7, 0, 6))
    path = write(folder / "two.mrc", density, 3.0)
    return cached(Entry("two", path, cluster="two"), SETTINGS, folder / "cache")


def whole_maps(count: int = 11) -> list[WholeMap]:
    return bundle_maps("train", count, 12, 6.0, 10.0, seed=0)


def train(volumes, seed=3, rank=0, world=1, accumulate=1, rotation="cube24", box=9, batch_size=4) -> TrainCrops:
    cropping = Cropping(box, rotation, shift=2, occupied=0.7)
    return TrainCrops(Cook(volumes, UNITS), cropping, 2, batch_size, seed, rank, world, accumulate)


def voxels(crops, steps: int, workers: int = 0) -> torch.Tensor:
    loader = DataLoader(crops, batch_size=None, sampler=range(steps), num_workers=workers)
    return torch.cat([batch["voxels"] for batch in loader])


@pytest.mark.parametrize("rotation", ["none", "cube24", "so3"])
def test_crops_are_the_same_for_any_number_of_workers(volume, rotation):
    crops = train([volume], rotation=rotation)
    first = voxels(crops, 6)
    for workers in (1, 2):
        assert torch.equal(voxels(crops, 6, workers), first)
    assert not torch.equal(voxels(train([volume], seed=4, rotation=rotation), 6), first)


def test_every_pass_cuts_anew():
    crops = train(whole_maps(4), box=12)
    assert len(crops) == 2
    first, second = voxels(crops, 4)[:8], voxels(crops, 4)[8:]
    assert all((row - other).abs().max() > 0.1 for row in first for other in second)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_accumulation_share_out_the_same_batch(world, accumulate):
    volumes = whole_maps()
    whole = train(volumes, box=12)
    shares = [train(volumes, box=12, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for step in range(3):
        parts = [crops[step * accumulate + part] for crops in shares for part in range(accumulate)]
        assert {len(part["voxels"]) for part in parts} == {4 // (world * accumulate)}
        places = torch.cat([part["place"] for part in parts])
        found = torch.cat([part["voxels"] for part in parts])[places.argsort()]
        assert torch.equal(found, whole[step]["voxels"])
        assert whole[step]["place"].tolist() == list(range(4 * step, 4 * step + 4))


def test_a_batch_says_what_turns_it_back_into_density():
    maps = whole_maps(3)
    batch = EvalCrops(Cook(maps, UNITS), Cropping(12), 5, 8, 0, "test")[0]
    assert batch["ids"] == ["train-0", "train-1", "train-2"]  # a whole map has one crop
    for row, whole in enumerate(maps):
        density = (batch["voxels"][row] * batch["std"] + batch["mean"]) * batch["scale"][row]
        assert density.numpy() == pytest.approx(whole.density * whole.scale, abs=1e-6 * whole.scale)
        assert batch["voxel_size"][row] == 6.0


def test_a_whole_map_is_turned_and_moved_but_not_changed():
    (whole,) = whole_maps(1)
    for place in range(20):
        found = crop(whole, Cropping(12, "cube24", shift=3), random_stream(0, "train", place))["density"]
        assert np.sort(found.ravel()) == pytest.approx(np.sort(whole.density.ravel()), abs=1e-6)


def test_crops_stay_in_the_map_and_most_are_near_density(volume):
    occupied = volume._all()["occupied"]
    near = 0
    for place in range(400):
        centre = volume.centre(random_stream(0, "train", place), 4, 0.7)
        assert (centre >= 4).all()
        assert (centre < 32 - 4).all()
        near += bool(occupied[tuple(centre)])
    assert near / 400 == pytest.approx(0.7, abs=0.07)
    for place in range(100):
        found = crop(volume, Cropping(9, "cube24", occupied=1.0), random_stream(0, "train", place))["density"]
        assert found.max() > SETTINGS.threshold


def test_centres_are_drawn_evenly_from_their_kind(volume):
    draws = Counter(tuple(volume.centre(random_stream(1, "train", place), 4, 1.0)) for place in range(4000))
    inside = np.argwhere(volume._all()["occupied"][4:28, 4:28, 4:28]) + 4
    counts = np.array([draws[tuple(place)] for place in inside])
    assert counts.sum() == 4000
    # chi-squared over the voxels, within four standard deviations of its mean
    expected = 4000 / len(inside)
    freedom = len(inside) - 1
    assert ((counts - expected) ** 2 / expected).sum() == pytest.approx(freedom, abs=4 * np.sqrt(2 * freedom))


def test_a_rotated_crop_of_a_map_is_cut_where_it_would_be_unrotated(volume):
    """An even box is turned about its voxel box // 2, exactly: the centre keeps its value."""
    for place in range(10):
        stream = lambda place=place: random_stream(0, "train", place)  # noqa: E731
        centre = volume.centre(stream(), 4, 1.0)
        found = crop(volume, Cropping(8, "cube24", occupied=1.0), stream())["density"]
        assert found[4, 4, 4] == volume.grids()["density"][tuple(centre)]


def test_beyond_a_map_there_is_nothing():
    grid = np.ones((6, 6, 6), np.float32)
    found = cut(grid, np.array([1, 3, 5]), 4)
    assert found.sum() == 3 * 4 * 3
    assert found[0].sum() == found[:, :, 3].sum() == 0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_sees_every_crop_on_any_number_of_processes(volume, world):
    cook = Cook([volume, volume, volume], UNITS)
    parts = [EvalCrops(cook, Cropping(9, occupied=1.0), 3, 2, 0, "test", rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    batches = [part[number] for part in parts for number in range(len(part))]
    places = torch.cat([batch["place"] for batch in batches])
    assert set(places.tolist()) == set(range(9))
    assert len(places) == 9 + (world == 2)
    rows = torch.cat([batch["voxels"] for batch in batches])
    whole = torch.cat([batch["voxels"] for batch in EvalCrops(cook, Cropping(9, occupied=1.0), 3, 9, 0, "test")])
    assert torch.equal(rows, whole[places])
    with pytest.raises(IndexError):
        parts[0][len(parts[0])]


def test_measured_units_are_those_of_the_crops():
    maps = whole_maps()
    found = measured(maps, Cropping(12), seed=0)
    everything = np.stack([whole.density for whole in maps])
    assert (found.mean, found.std) == pytest.approx((everything.mean(), everything.std()), rel=1e-5)
