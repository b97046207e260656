"""Processed maps on the disk, complete or absent, made anew when settings change, read when they are touched."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int

from datamodules.jsonl import regular_file
from datamodules.map_entries import Entry
from datamodules.map_processing import VERSION, Processed, Processing, process
from datamodules.shards import appearing_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedMap:
    """A processed map in a folder; every process maps its grids for itself."""

    id: str
    folder: Path
    scale: float
    voxel_size: float
    near: tuple[int, ...]  # in each plane (z), voxels near density that a whole crop fits around
    _opened: dict = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def grids(self) -> Mapping[str, np.ndarray]:
        return {name: grid for name, grid in self._all().items() if name != "occupied"}

    def _all(self) -> Mapping[str, np.ndarray]:
        if self._opened.get("process") != os.getpid():
            files = sorted(self.folder.glob("*.npy"))
            # plain arrays on the mapping: slicing an np.memmap costs several times as much
            opened = {file.stem: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)) for file in files}
            self._opened.update(process=os.getpid(), grids=opened)
        return self._opened["grids"]

    def centre(self, rng: np.random.Generator, reach: int, occupied: float | None) -> Int[np.ndarray, "3"]:
        """A voxel that a crop fits around, near density with the probability `occupied`; None: anywhere alike.

        Where there is no voxel of that kind the other kind is drawn from, and the centre where there is no density.
        """
        mask = self._all()["occupied"]
        if occupied is None:
            return rng.integers(reach, len(mask) - reach, 3)
        near = np.array(self.near)
        wanted = bool(rng.random() < occupied)
        if not near.any():
            return np.array(mask.shape) // 2
        counts = near if wanted else np.full_like(near, (len(mask) - 2 * reach) ** 2) - near
        if not counts.any():
            counts, wanted = near, True
        ends = np.cumsum(counts)
        number = int(rng.integers(ends[-1]))
        plane = int(np.searchsorted(ends, number, side="right"))
        inside = _inside(mask, reach)[plane] == wanted
        place = np.flatnonzero(inside)[number - ends[plane] + counts[plane]]
        return reach + np.array([plane, *np.unravel_index(place, inside.shape)])


def _inside(mask: np.ndarray, reach: int) -> np.ndarray:
    return mask[reach : len(mask) - reach, reach : len(mask) - reach, reach : len(mask) - reach]


def cached(entry: Entry, settings: Processing, cache: Path) -> CachedMap:
    """The processed map of an entry, from the cache when its files and all settings are the same."""
    key = _digest([VERSION, asdict(settings), *_what(entry, cache)])
    folder = cache / key[:32]
    with alone(cache / "locks" / key[:32]):
        known = _recorded(folder)
        if known is None:
            known = _kept(folder, process(entry, settings), settings.box // 2)
    return CachedMap(entry.id, folder, known["scale"], known["voxel_size"], tuple(known["near"]))


def _what(entry: Entry, cache: Path) -> list:
    """What the result depends on beside the settings; not the entry's name."""
    files = {name: getattr(entry, name) for name in ("map", "half1", "half2", "mask")}
    digests = {name: file_digest(path, cache) for name, path in files.items() if path}
    return [digests, entry.voxel_size, entry.contour]


def _recorded(folder: Path) -> dict | None:
    """What is known of a kept map, when all of it is there."""
    if not folder.is_dir():
        return None
    try:
        known = json.loads((folder / "map.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in known["files"]}
        if sizes == known["files"]:
            return known
    except (OSError, ValueError, KeyError):
        pass
    log.warning("%s is damaged and made anew", folder)
    shutil.rmtree(folder)
    return None


def _kept(folder: Path, made: Processed, reach: int) -> dict:
    """Write beside the folder and give it its name at the end."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name, grid in made.grids.items():
            with (beside / f"{name}.npy").open("wb") as file:
                np.save(file, grid)
                file.flush()
                os.fsync(file.fileno())
        near = _inside(made.grids["occupied"], reach).sum(axis=(1, 2)).tolist()
        files = {file.name: file.stat().st_size for file in sorted(beside.iterdir())}
        known = {"scale": made.scale, "voxel_size": made.voxel_size, "near": near, "files": files}
        with appearing_whole(beside / "map.json") as file:
            file.write(json.dumps(known).encode())
        beside.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return known


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process after another: the second finds what the first has made."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_digest(path: Path, cache: Path) -> str:
    """SHA-256 of a file's bytes, remembered as long as its size and time stay the same."""
    known = regular_file(path).stat()
    note = cache / "digests" / _digest([str(path.resolve()), known.st_size, known.st_mtime_ns])
    if note.exists():
        return note.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with appearing_whole(note) as file:
        file.write(found.encode())
    return found


def _digest(known: list) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
