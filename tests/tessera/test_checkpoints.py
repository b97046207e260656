"""Checkpoints are complete or absent, and the newest valid one is found."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tessera.checkpoints import (
    VerifiedCheckpointIO,
    newest_valid,
    read,
    read_manifest,
    sha256,
    sweep_up,
    verify,
    write_whole,
)

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


# ---- the manifest


def test_a_manifest_is_never_half_written(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    before = (tmp_path / "manifest.json").read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("pulled the plug")))
    with pytest.raises(OSError, match="pulled the plug"):
        saved(tmp_path, 2)
    assert (tmp_path / "manifest.json").read_text() == before
    assert json.loads(before)
    assert newest_valid(tmp_path)[0] == tmp_path / "step-000001.ckpt"


def test_a_checkpoint_is_recorded_with_the_digest_of_what_is_on_the_disk(tmp_path):
    saved(tmp_path, 3)
    path = tmp_path / "step-000003.ckpt"
    assert read_manifest(tmp_path)[path.name] == {"step": 3, "bytes": path.stat().st_size, "sha256": sha256(path)}


def test_old_steps_are_removed_by_their_number_and_never_by_their_date(tmp_path):
    saved(tmp_path, 9, 6)
    os.utime(tmp_path / "step-000009.ckpt", (0, 0))
    checkpoint = {"global_step": 12, "state_dict": {}}
    VerifiedCheckpointIO(keep=2).save_checkpoint(checkpoint, tmp_path / "step-000012.ckpt")
    assert sorted(read_manifest(tmp_path)) == ["step-000009.ckpt", "step-000012.ckpt"]
    assert newest_valid(tmp_path)[0] == tmp_path / "step-000012.ckpt"


def test_what_a_killed_process_was_writing_is_swept_up(tmp_path):
    saved(tmp_path, 1)
    subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIDDLE, str(tmp_path / "step-000002.ckpt")], check=False)
    assert len(list(tmp_path.glob(".*.part"))) == 1
    sweep_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step-000001.ckpt"]


def test_a_full_disk_is_said_with_both_sizes_and_leaves_the_older_checkpoint(tmp_path):
    saved(tmp_path, 1)
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from tessera.checkpoints import VerifiedCheckpointIO\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "checkpoint = {'global_step': 2, 'state_dict': {'weight': torch.zeros(100_000)}}\n"
        "VerifiedCheckpointIO().save_checkpoint(checkpoint, Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "b.ckpt")], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(
        r"OSError: .*/b.ckpt could not be written: it needs 400,000 bytes, and [\d,]+ are free", done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step-000001.ckpt"]
    assert newest_valid(tmp_path)[0] == tmp_path / "step-000001.ckpt"
