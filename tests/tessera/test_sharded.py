"""A checkpoint in parts is the checkpoint: whole for any number of processes, or refused; and nothing in it runs."""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from tessera import sharded
from tessera.build import LightningEnvironment
from tessera.checkpoints import VerifiedCheckpointIO, newest_valid, read, read_manifest, verify
from tessera.fsdp import Sharding, names_of, restore_optimizer
from tessera.hashing import Hashing, save
from tessera.saving import Newest
from tessera.stopping import Stop

MESHES = [(1,), (2,), (4,), (3, 1), (2, 2), (2, 3)]
SHAPES = [(5, 3), (4, 2), (1, 7), (6,), (3, 2, 2)]


@contextmanager
def process(rank: int, sizes: tuple[int, ...]):
    """The mesh as one process of a group sees it; the others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(sizes).numel())
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    finally:
        dist.destroy_process_group()


def distributed(whole: Tensor, mesh) -> DTensor:
    """A tensor sharded over the last dimension of the mesh and replicated over the others, as FSDP2 does it."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    size, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    local = whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, size))]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def wholes(step: int = 3) -> dict:
    """A checkpoint as one process would have it."""
    torch.manual_seed(step)
    tensors = {f"layer{n}.weight": torch.randn(shape) for n, shape in enumerate(SHAPES)}
    tensors["tied.weight"] = tensors["layer0.weight"]
    tensors["half"] = torch.randn(9, 2).to(torch.bfloat16)
    moments = {n: {"step": torch.tensor(3.0), "exp_avg": torch.randn(shape)} for n, shape in enumerate(SHAPES)}
    groups = [{"lr": 0.1, "network": "policy", "params": list(moments)}]
    return {
        "global_step": step,
        "state_dict": {**tensors, "buffer": torch.arange(3)},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "rng": {"python": (3, (1, 2), None), "torch": torch.get_rng_state()},
    }


def is_sharded(name: str) -> bool:
    return "weight" in name or "half" in name or "exp_avg" in name


def written(path: Path, sizes: tuple[int, ...], step: int = 3) -> Path:
    """A checkpoint folder, written by the processes of a mesh one after another, and its entry in the manifest."""
    sharded.prepare(path)
    parts = []
    for rank in range(torch.Size(sizes).numel()):
        with process(rank, sizes) as mesh:
            checkpoint = sharded.replaced(
                wholes(step), lambda name, leaf, mesh=mesh: distributed(leaf, mesh) if is_sharded(name) else leaf
            )
            parts.append(sharded.write_parts(checkpoint, sharded.unfinished(path), rank))
    entry = {"step": step, **sharded.write_index(sharded.unfinished(path), parts)}
    sharded.complete(path)
    VerifiedCheckpointIO().enter(path, entry)
    return path


def equal(ours, theirs) -> bool:
    """The same tensors to the byte, and the same values."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(theirs, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs


@pytest.fixture
def folder(tmp_path) -> Path:
    """What two processes wrote."""
    return written(tmp_path / "step-000003.ckpt", (2,))


# ---- parts and the whole


@pytest.mark.parametrize("sizes", MESHES)
def test_what_any_mesh_writes_is_read_as_one_file_would_be(sizes, tmp_path):
    path = written(tmp_path / "step-000003.ckpt", sizes)
    assert equal(read(path), wholes())
    assert equal(VerifiedCheckpointIO().load_checkpoint(path), wholes())


@pytest.mark.parametrize("sizes", MESHES)
def test_every_number_is_written_once_and_by_every_process_some(sizes, tmp_path):
    path = written(tmp_path / "step-000003.ckpt", sizes)
    files = sorted(path.glob("shard-*.pt"))
    assert len(files) == torch.Size(sizes).numel()
    held = [sum(part.numel() for part in torch.load(file, weights_only=True).values()) for file in files]
    counted = []
    sharded.replaced(wholes(), lambda name, leaf: counted.append(leaf.numel()) if is_sharded(name) else None)
    assert sum(held) == sum(counted)
    assert min(held) > 0


@pytest.mark.parametrize("there", [(2,), (2, 2)])
@pytest.mark.parametrize("here", [(1,), (3,), (2, 2)])
def test_a_process_of_another_mesh_finds_its_part(there, here, tmp_path):
    path = written(tmp_path / "step-000003.ckpt", there)
    for rank in range(torch.Size(here).numel()):
        with process(rank, here) as mesh:
            checkpoint, expected = sharded.lazy(path)["state_dict"], wholes()["state_dict"]
            for name in filter(is_sharded, expected):
                ours = distributed(expected[name], mesh)
                assert torch.equal(checkpoint[name][sharded.extent(ours)], ours.to_local()), name


def test_an_outline_has_shapes_and_plain_values_but_no_numbers(folder):
    outline, expected = sharded.outline(folder), wholes()
    assert outline["global_step"] == 3
    assert outline["rng"]["python"] == expected["rng"]["python"]
    assert all(value.shape == expected["state_dict"][name].shape for name, value in outline["state_dict"].items())
    assert outline["state_dict"]["layer0.weight"].is_meta


def test_tied_tensors_are_written_once(folder):
    parts = torch.load(folder / "shard-00000.pt", weights_only=True)
    tied, original = parts["/state_dict/tied.weight"], parts["/state_dict/layer0.weight"]
    assert tied.untyped_storage().data_ptr() == original.untyped_storage().data_ptr()


# ---- complete or absent


def test_until_it_is_complete_there_is_nothing_under_the_name(tmp_path):
    path = tmp_path / "step-000003.ckpt"
    sharded.prepare(path)
    with process(0, (2,)):
        sharded.write_parts(wholes(), sharded.unfinished(path), 0)
    assert not path.exists()
    assert newest_valid(tmp_path) == (None, {})
    written(tmp_path / "step-000004.ckpt", (1,))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "step-000004.ckpt"]


@pytest.mark.parametrize("before", ["folder", "file"])
def test_a_folder_takes_the_place_of_what_had_its_name(before, tmp_path):
    path = tmp_path / "best.ckpt"
    if before == "folder":
        written(path, (2,), step=1)
    else:
        VerifiedCheckpointIO().save_checkpoint({"global_step": 1}, path)
    written(path, (2,), step=2)
    assert read(path)["global_step"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.ckpt", "manifest.json"]


def test_a_file_takes_the_place_of_a_folder(folder):
    VerifiedCheckpointIO().save_checkpoint({"global_step": 5}, folder)
    assert read(folder) == {"global_step": 5}
    assert sorted(file.name for file in folder.parent.iterdir()) == ["manifest.json", "step-000003.ckpt"]


def test_a_removed_folder_is_gone_and_no_longer_recorded(folder):
    VerifiedCheckpointIO().remove_checkpoint(folder)
    assert [file.name for file in folder.parent.iterdir()] == ["manifest.json"]
    assert read_manifest(folder.parent) == {}


def test_a_broken_checkpoint_makes_way_for_the_next_broken_one(tmp_path):
    path = tmp_path / "step-000003.ckpt"
    for step, kind in enumerate(["folder", "folder", "file", "file", "folder"]):
        if kind == "folder":
            written(path, (1,), step=step)
        else:
            VerifiedCheckpointIO().save_checkpoint({"global_step": step}, path)
        sharded.set_aside(path)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "step-000003.broken"]
        assert read(tmp_path / "step-000003.broken")["global_step"] == step


# ---- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a missing shard": ("shard-00001.pt", Path.unlink, "does not exist"),
    "a missing index": ("index.json", Path.unlink, "does not exist"),
    "a missing rest": ("rest.pt", Path.unlink, "does not exist"),
    "a truncated shard": ("shard-00000.pt", lambda path: os.truncate(path, 100), "has 100 bytes where"),
    "an empty index": ("index.json", lambda path: os.truncate(path, 0), "has 0 bytes where"),
    "a flipped bit in a shard": ("shard-00001.pt", flip, "differs from what was written"),
    "a flipped bit in the index": ("index.json", flip, "differs from what was written"),
    "a flipped bit in the rest": ("rest.pt", flip, "differs from what was written"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_its_file_and_an_older_one_taken(damage, folder):
    name, harm, reason = DAMAGE[damage]
    newer = written(folder.parent / "step-000009.ckpt", (2,), step=9)
    harm(newer / name)
    with pytest.raises(ValueError, match=re.escape(f"{newer / name} {reason}")):
        verify(newer)
    path, broken = newest_valid(folder.parent)
    assert path == folder
    assert list(broken) == [newer]


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "is not the index of a checkpoint"),
        (b"[]", "is not the index of a checkpoint"),
        (b'{"/state_dict/half": [{"file": "shard-00000.pt"}]}', "is not the index of a checkpoint"),
        (b"{}", r"is not whole: \d+ of \d+ numbers are in no file"),
        (b'{"/state_dict/layer0.weight": [{"file": "../x", "offset": [0, 0], "shape": [5, 3]}]}', "x does not exist"),
        (
            b'{"/state_dict/layer0.weight": [{"file": "shard-00000.pt", "offset": [0, 0], "shape": [5, 3]}]}',
            "shard-00000.pt does not hold the part of /state_dict/layer0.weight",
        ),
    ],
)
def test_an_index_that_does_not_fit_is_refused_also_without_a_manifest(index, reason, folder):
    (folder.parent / "manifest.json").unlink()
    (folder / "index.json").write_bytes(index)
    with pytest.raises(ValueError, match=reason):
        read(folder)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["rest.pt", "shard-00001.pt", "index.json", ".metadata", "meta.pt"])
@pytest.mark.parametrize("act", [read, sharded.outline, lambda path: VerifiedCheckpointIO().load_checkpoint(path)])
def test_nothing_in_any_file_of_a_folder_is_executed(act, name, folder, tmp_path):
    (folder.parent / "manifest.json").unlink()
    target, known = tmp_path / "touched", (folder / name).exists()
    with (folder / name).open("wb") as file:
        torch.save({"bomb": Bomb(target)}, file)
    torch.load(folder / name, weights_only=False)
    assert target.exists(), "the bomb is none"
    target.rmdir()
    if not known or (act is sharded.outline and name != "rest.pt"):
        act(folder)  # the file is not looked at
    else:
        with pytest.raises(ValueError, match=r"is not (a checkpoint|the index of a checkpoint)"):
            act(folder)
    assert not target.exists()


# ---- the strategy, with one process


class Line(L.LightningModule):
    """Two layers, whose matrices and vectors are groups of their own, and dropout."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 4)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.first.weight, DTensor):
            for layer in (self.first, self.second):
                fully_shard(layer, mesh=self.device_mesh)

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step)
        hidden = nn.functional.dropout(self.first(batch), 0.5)
        return (self.second(hidden) - batch).square().mean()

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim == 2]
        vectors = [p for p in self.parameters() if p.ndim == 1]
        options = {"network": "policy", "delay": 2, "lr": 0.1}
        return torch.optim.AdamW([{"params": matrices, **options}, {"params": vectors, "weight_decay": 0.0, **options}])


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A process group of this process alone."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(
    folder: Path, steps: int, strategy, resumed: Path | None = None, width: int = 4, keep: int = 9
) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[Newest(folder, 1, 0, Stop())],
        plugins=[VerifiedCheckpointIO(keep), LightningEnvironment()],
        **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
    )
    data = DataLoader(torch.arange(32.0).view(8, 4) / 32, batch_size=2)
    trainer.fit(Line(width), data, ckpt_path=resumed, weights_only=True)
    return trainer


def state(path: Path) -> dict:
    """Weights, and the optimizer's state by parameter."""
    checkpoint = read(path)
    (optimizer,) = checkpoint["optimizer_states"]
    order = [key for group in optimizer["param_groups"] for key in group["params"]]
    return {"model": checkpoint["state_dict"], "optimizer": [optimizer["state"][key] for key in order]}


@pytest.mark.usefixtures("alone")
def test_a_folder_holds_what_a_file_holds_and_both_are_resumed_alike(tmp_path):
    trained(tmp_path / "folders", 2, Sharding(folders=True))
    trained(tmp_path / "files", 2, Sharding(folders=False))
    one, other = tmp_path / "folders" / "step-000002.ckpt", tmp_path / "files" / "step-000002.ckpt"
    assert one.is_dir()
    assert other.is_file()
    assert equal(state(one), state(other))
    after = []
    for resumed in (one, other):
        for name, strategy in (("sharded", Sharding(folders=True)), ("file", Sharding()), ("plain", "auto")):
            trained(tmp_path / resumed.parent.name / name, 4, strategy, resumed)
            after.append(state(tmp_path / resumed.parent.name / name / "step-000004.ckpt"))
    assert all(equal(found, after[0]) for found in after)
    assert not equal(after[0]["model"], state(one)["model"])


@pytest.mark.usefixtures("alone")
def test_the_moments_of_one_process_go_to_their_own_parameters(tmp_path):
    """Lightning numbers parameters by their order in the module, optimizers by their order in the groups."""
    trained(tmp_path / "plain", 2, "auto")
    before = state(tmp_path / "plain" / "step-000002.ckpt")
    trainer = trained(tmp_path / "sharded", 2, Sharding(folders=True), tmp_path / "plain" / "step-000002.ckpt")
    trainer.save_checkpoint(tmp_path / "sharded" / "again.ckpt")
    assert equal(state(tmp_path / "sharded" / "again.ckpt"), before)


@pytest.mark.usefixtures("alone")
def test_options_of_parameter_groups_survive(tmp_path):
    trained(tmp_path, 2, Sharding(folders=True))
    trainer = trained(tmp_path / "again", 3, Sharding(folders=True), tmp_path / "step-000002.ckpt")
    ours, fresh = trainer.optimizers[0].param_groups, Line().configure_optimizers().param_groups
    assert [{k: v for k, v in group.items() if k != "params"} for group in ours] == [
        {k: v for k, v in group.items() if k != "params"} for group in fresh
    ]


@pytest.mark.usefixtures("alone")
def test_a_folder_of_another_model_is_refused(tmp_path):
    trained(tmp_path, 1, Sharding(folders=True))
    with pytest.raises(ValueError, match=r"of another model: first.weight is \(4, 4\) there and \(5, 4\) here"):
        trained(tmp_path, 2, Sharding(folders=True), tmp_path / "step-000001.ckpt", width=5)


@pytest.mark.usefixtures("alone")
def test_a_damaged_folder_is_not_loaded(tmp_path):
    trained(tmp_path, 1, Sharding(folders=True))
    flip(tmp_path / "step-000001.ckpt" / "shard-00000.pt")
    with pytest.raises(ValueError, match=r"shard-00000\.pt differs from what was written"):
        trained(tmp_path, 2, Sharding(folders=True), tmp_path / "step-000001.ckpt")


@pytest.mark.usefixtures("alone")
def test_old_folders_are_removed(tmp_path):
    trained(tmp_path, 4, Sharding(folders=True), keep=2)
    names = [path.name for path in sorted(tmp_path.glob("*")) if path.name != "store"]
    assert names == ["manifest.json", "step-000003.ckpt", "step-000004.ckpt"]
    assert sorted(read_manifest(tmp_path)) == names[1:]


@pytest.mark.usefixtures("alone")
def test_state_finds_its_parameter_by_name_when_the_order_has_changed(tmp_path):
    trained(tmp_path, 2, Sharding(folders=True))
    saved = read(tmp_path / "step-000002.ckpt")["optimizer_states"][0]
    line = Line()
    backwards = [list(reversed(group["params"])) for group in line.configure_optimizers().param_groups]
    optimizer = torch.optim.AdamW([{"params": group} for group in backwards])
    restore_optimizer(optimizer, saved, names_of(line))
    first = saved["param_groups"][0]["params"][0]
    assert equal(optimizer.state[line.first.weight], saved["state"][first])
    assert [group["network"] for group in optimizer.param_groups] == ["policy", "policy"]
    with pytest.raises(ValueError, match=r"other parameters in the group of second\.bias"):
        restore_optimizer(torch.optim.AdamW([{"params": g} for g in reversed(backwards)]), saved, names_of(line))


def test_a_full_disk_is_said_with_both_sizes(tmp_path, monkeypatch):
    """torch's own error is `unexpected pos 704 vs 598`."""

    def full(hashing, _):
        hashing.failed = OSError(28, "No space left on device")
        raise hashing.failed

    monkeypatch.setattr(Hashing, "write", full)
    with pytest.raises(OSError, match=r"/file could not be written: it needs 12 bytes, and [\d,]+ are free"):
        sharded.write_file(tmp_path / "file", 12, lambda file: save({"a": torch.zeros(3)}, file))


def test_what_a_killed_writer_left_is_cleared_also_before_a_file_is_written(folder):
    for name in ("best.ckpt", "step-000006.ckpt"):
        sharded.unfinished(folder.parent / name).mkdir()
    VerifiedCheckpointIO().save_checkpoint({"global_step": 6}, folder.parent / "step-000006.ckpt")
    assert sorted(f.name for f in folder.parent.iterdir()) == ["manifest.json", "step-000003.ckpt", "step-000006.ckpt"]


@pytest.mark.usefixtures("alone")
def test_a_write_that_fails_is_said_and_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    trainer = trained(tmp_path, 2, Sharding(folders=True))
    monkeypatch.setattr(sharded, "write_file", full)
    with pytest.raises(OSError, match=r"no space left on device \(process 0\)"):
        trainer.save_checkpoint(tmp_path / "step-000003.ckpt")
    assert newest_valid(tmp_path) == (tmp_path / "step-000002.ckpt", {})
    assert not (tmp_path / "step-000003.ckpt").exists()


def test_the_manifest_is_plain_json(folder):
    entry = json.loads((folder.parent / "manifest.json").read_text())[folder.name]
    assert sorted(entry["files"]) == ["index.json", "rest.pt", "shard-00000.pt", "shard-00001.pt"]
    assert entry["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
