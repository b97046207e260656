"""A checkpoint as a folder, to which every process adds the parts of tensors that it holds.

    step-000010.ckpt/
        rest.pt         the checkpoint, in which every sharded tensor is only a name, a shape and a dtype
        shard-00000.pt  the parts of process 0 by name, and so on
        index.json      for every name the files of its parts, with their offset and shape in the whole

Files are read with `weights_only=True` through a memory map: nothing in them is executed, and a process that needs a
part of a tensor reads no more than the parts which overlap it. So what N processes wrote, any number can read.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tessera.hashing import room_for, save, size, write_through

REST, INDEX = "rest.pt", "index.json"


@dataclass
class Piece:
    """A part of a tensor: the file that has it under the tensor's name, and where it lies in the whole."""

    file: str
    offset: list[int]
    shape: list[int]

    def overlap(self, slices: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """What it shares with these slices of the whole."""
        ends = [begin + length for begin, length in zip(self.offset, self.shape)]
        both = tuple(slice(max(s.start, a), min(s.stop, b)) for s, a, b in zip(slices, self.offset, ends))
        return both if all(s.start < s.stop for s in both) else None


Written = tuple[dict[str, dict[str, Any]], dict[str, Piece]]  # entries of files by file name, pieces by tensor


# ---- where parts lie


def extent(tensor: Tensor) -> tuple[slice, ...]:
    """Where the part of a tensor that this process holds lies in the whole; all of it, if it is not sharded."""
    slices = [slice(0, length) for length in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for placement, parts, mine in zip(tensor.placements, mesh.shape, mesh.get_coordinate()):
            if placement.is_shard():  # cut as torch.chunk does: equal parts, of which the last may be short or empty
                begin, end = slices[placement.dim].start, slices[placement.dim].stop
                size = math.ceil((end - begin) / parts)
                slices[placement.dim] = slice(min(begin + mine * size, end), min(begin + (mine + 1) * size, end))
    return tuple(slices)


def writes(tensor: DTensor, number: int) -> bool:
    """Whether it is this process, of all that hold this part of the tensor with that number, which writes it."""
    holders, mine = 1, 0
    mesh = tensor.device_mesh
    for placement, parts, here in zip(tensor.placements, mesh.shape, mesh.get_coordinate()):
        if not placement.is_shard():
            holders, mine = holders * parts, mine * parts + here
    return number % holders == mine and tensor.to_local().numel() > 0


def replaced(tree: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """The same dictionaries and lists, in which `change(name, leaf)` stands for everything else."""
    if isinstance(tree, dict):
        return {key: replaced(value, change, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [replaced(value, change, f"{name}/{index}") for index, value in enumerate(tree)]
    return change(name, tree)


def sharded_tensors(checkpoint: dict[str, Any]) -> dict[str, DTensor]:
    """The tensors of a checkpoint of which every process holds a part, by name."""
    found: dict[str, DTensor] = {}
    replaced(checkpoint, lambda name, leaf: found.update({name: leaf}) if isinstance(leaf, DTensor) else None)
    return found


# ---- writing


def write_file(path: Path, needed: int, write: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    """Write one file of `needed` bytes through to the disk; its entry for the manifest, by name: bytes and sha256.

    Raises OSError, with the bytes needed and free where the disk is full.
    """
    with room_for(path, needed):
        return {path.name: write_through(path, write)}


def write_parts(checkpoint: dict[str, Any], folder: Path, rank: int) -> Written:
    """Write what this process holds of a checkpoint; the entries of its files, and the pieces by name.

    Where several processes hold the same parts, they write the tensors by turns. Raises OSError.
    """
    tensors = sharded_tensors(checkpoint)
    held = {name: tensor for number, (name, tensor) in enumerate(tensors.items()) if writes(tensor, number)}
    name_of_file = f"shard-{rank:05d}.pt"
    parts = {name: tensor.to_local().detach().cpu() for name, tensor in held.items()}
    files = write_file(folder / name_of_file, size(parts), lambda file: save(parts, file))
    if rank == 0:
        rest = replaced(checkpoint, lambda _, leaf: outlined(leaf) if isinstance(leaf, DTensor) else leaf)
        files |= write_file(folder / REST, size(rest), lambda file: save(rest, file))
    offsets = {name: [s.start for s in extent(tensor)] for name, tensor in held.items()}
    return files, {name: Piece(name_of_file, offsets[name], list(part.shape)) for name, part in parts.items()}


def outlined(tensor: Tensor) -> Tensor:
    """A tensor's shape and dtype, without its numbers."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def write_index(folder: Path, written: list[Written]) -> dict[str, Any]:
    """Write where all parts are, given what each process wrote; the folder's entry for the manifest."""
    index: dict[str, list[dict[str, Any]]] = {}
    files: dict[str, dict[str, Any]] = {}
    for entries, pieces in written:
        files |= entries
        for name, piece in pieces.items():
            index.setdefault(name, []).append(asdict(piece))
    content = json.dumps(index).encode()
    files |= write_file(folder / INDEX, len(content), lambda file: file.write(content))
    sync(folder)
    size = sum(entry["bytes"] for entry in files.values())
    return {"bytes": size, "sha256": digest({name: files[name]["sha256"] for name in files}), "files": files}


def digest(files: dict[str, str]) -> str:
    """One SHA-256 for a folder, from those of its files by name."""
    return hashlib.sha256("".join(f"{files[name]} {name}\n" for name in sorted(files)).encode()).hexdigest()


# ---- putting in place and away


def unfinished(path: Path) -> Path:
    """The folder beside a checkpoint in which it is written, or to which it is moved before it is deleted."""
    return path.with_name(f".{path.name}.part")


def clear(folder: Path) -> None:
    """Delete what was left of checkpoint folders when a process that wrote or deleted them was killed."""
    for left in folder.glob(".*.part"):
        if left.is_dir():
            shutil.rmtree(left)


def prepare(path: Path) -> None:
    """An empty folder to write a checkpoint in, and none of what was left by writers that were killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path.parent)
    unfinished(path).mkdir()


def complete(path: Path) -> None:
    """Give a written checkpoint its name; what had the name before is deleted afterwards."""
    old = path.with_name(f".{path.name}.old.part")
    if path.exists():
        old.mkdir()
        path.rename(old / path.name)
    unfinished(path).rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint folder, if it is one; when killed meanwhile, nothing is left under the checkpoint's name."""
    clear(path.parent)
    if not path.is_dir():
        return
    path.rename(unfinished(path))
    shutil.rmtree(unfinished(path))


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, file or folder, to `.broken`; an earlier one of that name makes way."""
    aside = path.with_suffix(".broken")
    remove(aside)
    aside.unlink(missing_ok=True)
    path.rename(aside)


def sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading


class Pieces:
    """A tensor in pieces on the disk: `pieces[slices]` reads those that the slices overlap.

    Indexing raises ValueError where pieces are missing, or are not what the index says.
    """

    def __init__(self, name: str, outline: Tensor, pieces: list[Piece], load: Callable[[str], dict[str, Tensor]]):
        self.name, self.shape, self.dtype, self.pieces, self.load = name, outline.shape, outline.dtype, pieces, load

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        part = torch.empty([s.stop - s.start for s in slices], dtype=self.dtype)
        missing = part.numel()
        for piece in self.pieces:
            if (both := piece.overlap(slices)) is not None:
                part[_seen_from([s.start for s in slices], both)] = self._read(piece)[_seen_from(piece.offset, both)]
                missing -= math.prod(s.stop - s.start for s in both)
        if missing:
            raise ValueError(f"{self.name} is not whole: {missing} of {part.numel()} numbers are in no file")
        return part

    def _read(self, piece: Piece) -> Tensor:
        found = self.load(piece.file).get(self.name)
        if found is None or list(found.shape) != piece.shape:
            raise ValueError(f"{piece.file} does not hold the part of {self.name} that the index names")
        return found

    def whole(self) -> Tensor:
        """All of it, in memory."""
        return self[tuple(slice(0, length) for length in self.shape)]


def _seen_from(origin: list[int], slices: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(s.start - zero, s.stop - zero) for s, zero in zip(slices, origin))


def load_file(path: Path) -> Any:
    """The tensors and plain values of a file, through a memory map.

    Raises ValueError where the file is missing, is no such file or holds anything that would be executed.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: there is no such checkpoint file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = re.split(r"(?<=\w)\. |\n", str(error))[0]
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values ({reason}): take one that a run here has written"
        ) from error


def outline(folder: Path) -> dict[str, Any]:
    """A checkpoint whose sharded tensors have a shape and a dtype, but no numbers."""
    return load_file(folder / REST)


def lazy(folder: Path) -> dict[str, Any]:
    """A checkpoint whose sharded tensors are still on the disk, as `Pieces`. Raises ValueError where files are bad."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        pieces = {name: [Piece(**piece) for piece in found] for name, found in index.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is not the index of a checkpoint ({error})") from error
    load = cache(lambda file: load_file(folder / Path(file).name))

    def opened(name: str, leaf: Any) -> Any:
        outlined = isinstance(leaf, Tensor) and leaf.is_meta
        return Pieces(name, leaf, pieces.get(name, []), load) if outlined else leaf

    return replaced(outline(folder), opened)


def read(folder: Path) -> dict[str, Any]:
    """A whole checkpoint, as one process would have written it into one file."""
    return replaced(lazy(folder), lambda _, leaf: leaf.whole() if isinstance(leaf, Pieces) else leaf)
