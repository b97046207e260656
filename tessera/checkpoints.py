"""Checkpoints that are complete or absent, and never execute anything.

A file is written beside its target, flushed to the disk and renamed; then its step, size and SHA-256 go into
`manifest.json` of the folder. What the manifest does not confirm does not exist.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import TorchCheckpointIO

from tessera import sharded
from tessera.hashing import room_for, save, size, write_through

MANIFEST = "manifest.json"
BESIDE = ".part"  # ending of a file that is being written


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes, or of a folder's files."""
    if path.is_dir():
        return sharded.digest({file.name: sha256(file) for file in path.iterdir()})
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, write: Any) -> dict[str, Any]:
    """Call `write(file)` on a file beside `path`, sync it and rename it: readers see the old bytes or all the new.

    Returns what a manifest records: bytes and sha256. The new name is sure to survive a power cut once the folder is
    synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}{BESIDE}")
    try:
        entry = write_through(beside, write)
        os.replace(beside, path)
        return entry
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    content = text.encode()
    with room_for(path, len(content)):
        write_whole(path, lambda file: file.write(content))
    sharded.sync(path.parent)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Entries by file name: step, bytes, sha256. Empty where there is no manifest."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


def sweep_up(folder: Path) -> None:
    """Remove what killed processes were writing; to be called by who holds the run."""
    sharded.clear(folder)
    for beside in folder.glob(f".*{BESIDE}"):
        beside.unlink(missing_ok=True)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole and recorded with their digest.

    Of the checkpoints `step-*` only the `keep` with the most steps stay.
    """

    def __init__(self, keep: int | None = None) -> None:
        super().__init__()
        self.keep = keep

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        sharded.remove(path)
        with room_for(path, size(checkpoint)):
            entry = write_whole(path, lambda file: save(checkpoint, file))
        # the folder is synced once for both, by the manifest: an entry without its file is no checkpoint
        self.enter(path, {"step": checkpoint["global_step"]} | entry)

    def enter(self, path: Path, entry: dict[str, Any]) -> None:
        """Record a checkpoint that was written, and remove those that it makes old."""
        self._record(path.parent, {path.name: entry})
        if self.keep:
            self._prune(path.parent, self.keep)

    def remove_checkpoint(self, path: Any) -> None:
        sharded.remove(Path(path)) if Path(path).is_dir() else super().remove_checkpoint(path)
        self._record(Path(path).parent, {})

    def _prune(self, folder: Path, keep: int) -> None:
        entries = read_manifest(folder).items()
        steps = sorted((entry["step"], name) for name, entry in entries if name.startswith("step-"))
        for _, name in steps[:-keep]:
            self.remove_checkpoint(folder / name)

    def _record(self, folder: Path, new: dict[str, Any]) -> None:
        manifest = read_manifest(folder) | new
        manifest = {name: entry for name, entry in manifest.items() if (folder / name).exists()}
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        if Path(path).is_dir():
            return read(Path(path))
        verify(Path(path))
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)


def recorded(path: Path) -> dict[Path, dict[str, Any]]:
    """The files of a checkpoint with what the manifest recorded of each; empty for a checkpoint from elsewhere.

    Raises ValueError where there is no such checkpoint.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: there is no such checkpoint file")
    entry = read_manifest(path.parent).get(path.name)
    if entry is None:
        return {}  # nothing to compare with, and loading reads tensors only
    return {path / name: file for name, file in entry["files"].items()} if "files" in entry else {path: entry}


def confirm(path: Path, entry: dict[str, Any]) -> None:
    """Raise ValueError, in one sentence, where a file is not what was recorded of it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: there is no such checkpoint file")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size} bytes where {entry['bytes']} were written: it is truncated")
    if sha256(path) != entry["sha256"]:
        raise ValueError(f"{path} differs from what was written (SHA-256): it is damaged, take an earlier one")


def verify(path: Path) -> None:
    """Raise ValueError, in one sentence, where a checkpoint is not what the manifest beside it recorded."""
    for file, entry in recorded(path).items():
        confirm(file, entry)


def read(path: Path) -> dict[str, Any]:
    """A verified checkpoint's tensors and plain values. Anything executable in it is refused unread."""
    verify(path)
    return sharded.read(path) if path.is_dir() else sharded.load_file(path)


def outline(path: Path) -> dict[str, Any]:
    """A verified checkpoint; the sharded tensors of a folder have a shape and a dtype, but no numbers."""
    verify(path)
    return sharded.outline(path) if path.is_dir() else sharded.load_file(path)


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The valid checkpoint with the most steps, and a sentence about each newer one that is not valid."""
    broken = {}
    by_step = sorted(read_manifest(folder).items(), key=lambda item: item[1]["step"], reverse=True)
    for name, _ in by_step:
        try:
            verify(folder / name)
            return folder / name, broken
        except ValueError as error:
            broken[folder / name] = str(error)
    return None, broken
