"""The data module of maps: where they come from, what is refused, and that a stand-in is never silent."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from maps import REAL, blob, real, write
from omegaconf import DictConfig, OmegaConf

from datamodules.emdb import EMDB
from datamodules.mrc import MapFormatError
from datamodules.simulated_maps import bundle_maps

ROOT = Path(__file__).parents[2]
SMALL = ("data.simulation={train: 6, val: 3, test: 2, resolution: 8.0}",)


@functools.cache
def configured(choice: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=["model=gpt2", choice])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`data("data=emdb", ...)` is the data module of these words, on one process."""
    monkeypatch.delenv("TESSERA_DATA", raising=False)

    def make(choice: str, *words: str, rank: int = 0, world: int = 1) -> EMDB:
        given = OmegaConf.from_dotlist([f"output={tmp_path / 'out'}", *words])
        config = OmegaConf.to_container(OmegaConf.merge(configured(choice), given).data, resolve=True)
        module = EMDB(**{key: value for key, value in config.items() if key != "_target_"})
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world, accumulate_grad_batches=1, global_step=0)
        return module

    return make


def write_maps(folder: Path, count: int = 4, **header) -> Path:
    for number in range(count):
        density = blob((20, 22, 24), 2.0, off=(number, 0, -number))
        write(folder / f"emd_{1000 + number}.map.gz", density, 3.0, compression="gzip", **header)
    return folder


# ---- simulated maps


def test_the_simulated_set_has_the_moments_of_its_specification():
    """Bundles of 24^3 voxels of 3 angstrom at 8 angstrom, of which the specification measured 384 of its own."""
    density = np.stack([whole.density for whole in bundle_maps("train", 128, 24, 3.0, 8.0, seed=0)])
    assert density.max() == 1
    assert density.mean() == pytest.approx(0.0122, rel=0.1)
    assert density.std() == pytest.approx(0.0744, rel=0.05)


def test_no_bundle_is_in_two_parts_and_none_depends_on_how_many_there_are():
    parts = {part: bundle_maps(part, 5, 12, 6.0, 10.0, seed=0) for part in ("train", "val", "test")}
    contents = [whole.density.tobytes() for maps in parts.values() for whole in maps]
    assert len(set(contents)) == 15
    assert bundle_maps("train", 2, 12, 6.0, 10.0, seed=0)[1].density.tobytes() == contents[1]
    assert bundle_maps("train", 2, 12, 6.0, 10.0, seed=1)[1].density.tobytes() != contents[1]


def test_without_maps_the_stand_in_is_said_and_named(data, caplog):
    standin, asked = data("data=emdb", *SMALL), data("data=emdb_sim", *SMALL)
    assert (standin.name, standin.standin) == ("emdb-standin", True)
    assert "emdb-standin: no maps found" in caplog.text
    assert (asked.name, asked.standin) == ("emdb_sim", False)
    assert torch.equal(next(iter(standin.val_dataloader()))["voxels"], next(iter(asked.val_dataloader()))["voxels"])
    assert caplog.text.count("standin") == 1


def test_batches_are_in_the_units_of_training(data):
    module = data("data=emdb_sim", *SMALL)
    batch = next(iter(module.train_dataloader()))
    assert batch["voxels"].shape == (8, 24, 24, 24)
    everything = torch.cat([batch["voxels"] for batch in module.test_dataloader()])
    assert len(everything) == 2
    rows = np.concatenate([whole.density.ravel() for whole in module.parts["train"]])
    assert (module.normalisation.mean, module.normalisation.std) == pytest.approx((rows.mean(), rows.std()), rel=1e-4)
    fixed = data("data=emdb_sim", *SMALL, "data.mean=0.04", "data.std=0.09")
    assert next(iter(fixed.train_dataloader()))["std"] == pytest.approx(0.09)


def test_a_checkpoint_brings_the_units_it_was_trained_in(data):
    first, other = data("data=emdb_sim", *SMALL), data("data=emdb_sim", *SMALL, "seed=7")
    assert first.normalisation != other.normalisation
    other.load_state_dict(first.state_dict())
    batch = next(iter(other.test_dataloader()))
    assert batch["mean"] == pytest.approx(first.normalisation.mean)


def test_a_run_that_goes_on_sees_what_would_have_come(data):
    module = data("data=emdb_sim", *SMALL, "data.batch_size=2")
    whole = [batch["voxels"] for batch in module.train_dataloader()]
    module.trainer.global_step = 1
    rest = [batch["voxels"] for batch in module.train_dataloader()]
    assert len(whole) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_two_processes_see_the_batch_of_one(data):
    words = ("data=emdb_sim", *SMALL, "data.batch_size=4")
    whole = next(iter(data(*words).train_dataloader()))["voxels"]
    parts = [next(iter(data(*words, rank=rank, world=2).train_dataloader()))["voxels"] for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)


# ---- files


def test_a_folder_of_maps_is_divided_processed_and_cut(data, tmp_path):
    words = ("data=emdb", f"data.path={write_maps(tmp_path)}", "data.box=8", "data.batch_size=2")
    module = data(*words)
    assert (module.name, module.standin) == ("emdb", False)
    assert {part: len(maps) for part, maps in module.parts.items()} == {"train": 2, "val": 1, "test": 1}
    assert next(iter(module.train_dataloader()))["voxels"].shape == (2, 8, 8, 8)
    assert [len(batch["voxels"]) for batch in module.test_dataloader()] == [2, 2]
    again = data(*words)
    assert again.fingerprint == module.fingerprint
    assert data(*words, "data.threshold=0.2").fingerprint != module.fingerprint


def test_half_maps_and_masks_of_all_entries_are_served(data, tmp_path):
    lines = ["id,map,half1,half2,mask,split"]
    for number, part in enumerate(("train", "val", "test")):
        density = 5 * blob((16, 16, 16), 2.5)
        rng = np.random.default_rng(number)
        for name in ("m", "h1", "h2"):
            noise = rng.standard_normal(density.shape) if name != "m" else 0
            write(tmp_path / f"{number}{name}.mrc", (density + 0.5 * noise).astype(np.float32), 3.0)
        write(tmp_path / f"{number}k.mrc", (density > 1).astype(np.float32), 3.0)
        lines.append(f"e{number},{number}m.mrc,{number}h1.mrc,{number}h2.mrc,{number}k.mrc,{part}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    words = ("data=emdb", f"data.path={tmp_path / 'm.csv'}", "data.box=8")
    module = data(*words, "data.target=halves")
    for loader in (module.train_dataloader(), module.test_dataloader()):
        batch = next(iter(loader))
        assert batch["half_maps"].shape == (len(batch["voxels"]), 2, 8, 8, 8)
        assert torch.allclose(batch["half_maps"].mean(dim=1), batch["voxels"], atol=1e-5)
        assert set(batch["mask"].unique().tolist()) == {0.0, 1.0}
    assert "half_maps" not in next(
        iter(data("data=emdb", f"data.path={tmp_path / 'm.csv'}", "data.box=8").val_dataloader())
    )


def test_what_is_no_density_is_left_aside_in_a_folder_and_stops_in_a_manifest(data, tmp_path, caplog):
    folder = write_maps(tmp_path)
    write(folder / "crystal.mrc", blob((20, 20, 20)), 3.0, cellb=(90, 100, 90))
    assert len(data("data=emdb", f"data.path={folder}", "data.box=8").parts["train"]) == 2
    assert "1 of 5 maps are left aside" in caplog.text
    assert "crystal.mrc has a cell" in caplog.text
    rows = "\n".join(f"{file.name},{file.name}" for file in sorted(folder.glob("*.m*")))
    (folder / "manifest.csv").write_text(f"id,map\n{rows}\n")
    with pytest.raises(MapFormatError, match=r"crystal\.mrc"):
        data("data=emdb", f"data.path={folder}", "data.box=8")


def test_a_damaged_file_stops_unless_such_are_to_be_skipped(data, tmp_path, caplog):
    folder = write_maps(tmp_path)
    (folder / "emd_1001.map.gz").write_bytes(b"nothing")
    with pytest.raises(MapFormatError, match=r"emd_1001\.map\.gz ends within its header"):
        data("data=emdb", f"data.path={folder}", "data.box=8")
    assert len(data("data=emdb", f"data.path={folder}", "data.box=8", "data.on_error=skip").parts["train"]) == 1
    assert "1 of 4 maps are left aside" in caplog.text


def test_structures_become_maps(data):
    module = data("data=emdb_sim", f"data.path={real('models')}", "data.batch_size=2")
    assert module.name == "emdb_sim"
    assert sum(map(len, module.parts.values())) == 6
    batch = next(iter(module.test_dataloader()))
    assert batch["voxel_size"][0] == 3.0
    assert batch["voxels"][0].max() > 1  # the first crop is about the centre of a protein


@pytest.mark.filterwarnings("ignore")
def test_the_real_maps_serve_crops(data, monkeypatch, caplog):
    real("maps")
    monkeypatch.setenv("TESSERA_DATA", str(REAL.parent))
    module = data("data=emdb", "data.batch_size=4")
    assert (module.name, module.standin) == ("emdb", False)
    assert {part: len(maps) for part, maps in module.parts.items()} == {"train": 5, "val": 1, "test": 1}
    assert "emd_3001.map has a cell" in caplog.text
    batch = next(iter(module.train_dataloader()))
    assert batch["voxels"].isfinite().all()
    assert batch["voxel_size"].numpy() == pytest.approx(3.0, rel=0.02)


# ---- what is refused


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("data.path=/nowhere", r"data\.path=/nowhere does not exist"),
        ("data.rotation=mirror", r"data\.rotation=mirror: there are none, cube24, so3"),
        ("data.target=primary", r"data\.target=primary"),
        ("data.nan_policy=mean", r"data\.nan_policy=mean"),
        ("data.precision=int8", r"data\.precision=int8"),
        ("data.on_error=ignore", r"data\.on_error=ignore"),
        ("data.box=0", r"data\.box=0 must be positive"),
        ("data.box=4", r"data\.box=4: at least 8"),
        ("data.shift=-1", r"data\.shift=-1"),
        ("data.voxel_size=0.0", r"data\.voxel_size=0.0"),
        ("data.std=-1.0", r"data\.std=-1"),
        ("data.occupied_fraction=1.5", r"data\.occupied_fraction=1.5"),
        ("data.percentile=10.0", r"data\.percentile=10"),
        ("data.simulation={train: 0, val: 1, test: 1, resolution: 8}", r"data\.simulation\.train=0"),
        ("data.simulation.resolution=-8", r"data\.simulation\.resolution=-8"),
        ("data.accessions=[abc]", r"data\.accessions has 'abc'"),
    ],
)
def test_wrong_values_are_refused_by_their_word(data, word, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as told:
        data("data=emdb", word)
    assert "\n" not in str(told.value)


def test_a_single_file_that_is_no_density_is_the_error(data, tmp_path):
    path = write(tmp_path / "crystal.mrc", blob((20, 20, 20)), 3.0, cellb=(90, 100, 90))
    with pytest.raises(MapFormatError, match=r"crystal\.mrc has a cell"):
        data("data=emdb", f"data.path={path}")


def test_too_few_maps_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="1 maps of 1 clusters cannot be divided"):
        data("data=emdb", f"data.path={write_maps(tmp_path, 1) / 'emd_1000.map.gz'}", "data.box=8")


def test_maps_to_test_only_need_the_units_of_training(data, tmp_path):
    write_maps(tmp_path, 1)
    (tmp_path / "m.csv").write_text("id,map,split\na,emd_1000.map.gz,test\n")
    words = ("data=emdb", f"data.path={tmp_path / 'm.csv'}", "data.box=8")
    with pytest.raises(ValueError, match=r"give data\.mean and data\.std"):
        data(*words)
    module = data(*words, "data.mean=0.04", "data.std=0.09")
    assert len(next(iter(module.test_dataloader()))["ids"]) == 4
    with pytest.raises(ValueError, match="no map of the split val"):
        module.val_dataloader()
