"""Checkpoints are complete or absent, and the newest valid one is found."""

import json
import os
import re
import subprocess
import sys

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tessera.checkpoints import Newest, VerifiedCheckpointIO, newest_valid, read, read_manifest, verify, write_whole

KILLED_IN_THE_MIDDLE = """
import os, sys, signal
from pathlib import Path
from tessera.checkpoints import write_whole

def write(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

write_whole(Path(sys.argv[1]), write)
"""


def saved(folder, *steps: int):
    """A folder with a checkpoint for each step, in the order given."""
    for step in steps:
        checkpoint = {"global_step": step, "state_dict": {"weight": torch.full((50,), float(step))}}
        VerifiedCheckpointIO().save_checkpoint(checkpoint, folder / f"step-{step:06d}.ckpt")
    return folder


def damage(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(path)], check=False)
    assert killed.returncode == -9
    assert path.read_bytes() == b"old"
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_the_manifest_records_step_size_and_digest_of_what_is_there(tmp_path):
    saved(tmp_path, 1, 2)
    manifest = read_manifest(tmp_path)
    assert {name: entry["step"] for name, entry in manifest.items()} == {"step-000001.ckpt": 1, "step-000002.ckpt": 2}
    assert all(entry["bytes"] == (tmp_path / name).stat().st_size for name, entry in manifest.items())
    VerifiedCheckpointIO().remove_checkpoint(tmp_path / "step-000001.ckpt")
    assert list(read_manifest(tmp_path)) == ["step-000002.ckpt"]


# ---- reading


def test_the_newest_is_the_one_with_the_most_steps_whatever_the_clock_says(tmp_path):
    saved(tmp_path, 30, 10, 20)
    os.utime(tmp_path / "step-000030.ckpt", (0, 0))
    assert newest_valid(tmp_path) == (tmp_path / "step-000030.ckpt", {})


def test_damaged_checkpoints_are_passed_over_with_the_reason(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    damage(tmp_path / "step-000004.ckpt")
    os.truncate(tmp_path / "step-000003.ckpt", 100)
    (tmp_path / "step-000002.ckpt").unlink()
    path, broken = newest_valid(tmp_path)
    assert path == tmp_path / "step-000001.ckpt"
    assert [file.stem for file in broken] == ["step-000004", "step-000003", "step-000002"]
    differs, truncated, missing = broken.values()
    assert differs.startswith(f"{tmp_path}/step-000004.ckpt differs from what was written (SHA-256)")
    assert re.fullmatch(
        rf"{tmp_path}/step-000003.ckpt has 100 bytes where \d+ were written: it is truncated", truncated
    )
    assert missing.startswith(f"{tmp_path}/step-000002.ckpt does not exist")


def test_a_file_that_the_manifest_does_not_know_is_not_found(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "step-000009.ckpt").write_bytes(b"written by a process that was killed before it could record it")
    assert newest_valid(tmp_path)[0] == tmp_path / "step-000001.ckpt"


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert newest_valid(tmp_path / "checkpoints") == (None, {})


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("load", [read, lambda path: VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)])
def test_nothing_in_a_checkpoint_is_executed(load, tmp_path):
    torch.save({"state_dict": {}, "bomb": Bomb(tmp_path / "touched")}, tmp_path / "bomb.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights only load failed"):
        load(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_from_elsewhere_has_nothing_to_be_compared_with(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "theirs.ckpt")
    verify(tmp_path / "theirs.ckpt")
    assert read(tmp_path / "theirs.ckpt") == {"state_dict": {}}


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    saved(tmp_path, 1)
    damage(tmp_path / "step-000001.ckpt")
    with pytest.raises(ValueError, match="it is damaged"):
        VerifiedCheckpointIO().load_checkpoint(tmp_path / "step-000001.ckpt")


# ---- when


class Line(L.LightningModule):
    """The smallest module that trains; it notes what has been saved when it is validated."""

    def __init__(self, folder):
        super().__init__()
        self.weight, self.folder, self.seen = torch.nn.Parameter(torch.zeros(1)), folder, []

    def training_step(self, batch, batch_idx):
        return (self.weight - batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append((self.global_step, sorted(entry["step"] for entry in read_manifest(self.folder).values())))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(folder, accumulate: int = 1, **newest) -> Line:
    """Twelve steps in epochs of four, validated at every sixth."""
    line = Line(folder)
    trainer = L.Trainer(
        max_steps=12,
        accumulate_grad_batches=accumulate,
        val_check_interval=6 * accumulate,
        check_val_every_n_epoch=None,
        callbacks=[Newest(folder, validated=6, **newest)],
        plugins=[VerifiedCheckpointIO()],
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(line, DataLoader(torch.ones(4 * accumulate)), DataLoader(torch.ones(1)))
    return line


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_newest_checkpoints_are_kept_also_at_the_end_of_an_epoch(accumulate, tmp_path):
    trained(tmp_path, accumulate, every=2, keep=100)
    assert sorted(entry["step"] for entry in read_manifest(tmp_path).values()) == [2, 4, 6, 8, 10, 12]
    trained(tmp_path / "two", accumulate, every=2, keep=2)
    files = [path.name for path in sorted((tmp_path / "two").glob("*"))]
    assert files == ["manifest.json", "step-000010.ckpt", "step-000012.ckpt"]
    assert sorted(read_manifest(tmp_path / "two")) == files[1:]


def test_a_validated_step_is_saved_after_its_validation(tmp_path):
    line = trained(tmp_path, every=3, keep=100)
    assert line.seen == [(6, [3]), (12, [3, 6, 9])]


def test_a_manifest_is_never_half_written(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    before = (tmp_path / "manifest.json").read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("pulled the plug")))
    with pytest.raises(OSError, match="pulled the plug"):
        saved(tmp_path, 2)
    assert (tmp_path / "manifest.json").read_text() == before
    assert json.loads(before)
    assert newest_valid(tmp_path)[0] == tmp_path / "step-000001.ckpt"
