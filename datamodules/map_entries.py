"""Entries: a map with its half maps, mask and contour level, from a manifest or by the names of files."""

import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from datamodules.jsonl import regular_file
from datamodules.mrc import MapFormatError, MapRecord

log = logging.getLogger(__name__)

COLUMNS = ("id", "map", "half1", "half2", "mask", "voxel_size", "resolution", "contour", "split", "cluster")
PARTS = ("train", "val", "test")
NAME = re.compile(r"(?P<stem>.+)\.(map|mrc)(\.gz|\.bz2)?", re.I)
HALF = re.compile(r"[_-]half[_-]?(?:map[_-]?)?([12])(?=[_-]|$)", re.I)
MASK = re.compile(r"[_-](?:msk|mask)(?:[_-]?\d+)?(?=[_-]|$)", re.I)
ACCESSION = re.compile(r"emd[_-](\d+)", re.I)
SAME_PLACE = 0.05  # voxels


@dataclass(frozen=True)
class Entry:
    """The files of one entry. `cluster` names what must not be divided between training and test, by default the id.

    `voxel_size` (angstrom) replaces what the headers say; `contour` is the recommended level, in the map's units.
    `listed` says that somebody asked for this entry, and not only for what is in a folder.
    """

    id: str
    map: Path | None = None
    half1: Path | None = None
    half2: Path | None = None
    mask: Path | None = None
    voxel_size: float | None = None
    resolution: float | None = None
    contour: float | None = None
    split: str | None = None
    cluster: str = ""
    listed: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.map, self.half1, self.half2, self.mask) if path)


def find_entries(path: Path | str) -> list[Entry]:
    """The entries of a manifest (.csv), a single map, or a folder: its manifest.csv, else the maps in it.

    In a folder without manifest the names say what is what: `emd_1234.map.gz`, `emd_1234_half_map_1.map.gz`,
    `emd_1234_msk_1.map`. It may hold the maps, a folder `maps` of them, or EMDB's `EMD-1234/map|other|masks`. Raises
    FileNotFoundError where there is none and ValueError where the manifest is wrong.
    """
    path = Path(path)
    if path.is_dir():
        manifest = path / "manifest.csv"
        return read_manifest(manifest) if manifest.exists() else _in_folder(path)
    if path.suffix == ".csv":
        return read_manifest(path)
    return [replace(entry, listed=True) for entry in named([regular_file(path)])]


def _in_folder(folder: Path) -> list[Entry]:
    places = [folder, folder / "maps", *sorted(folder.glob("EMD-*/map")), *sorted(folder.glob("EMD-*/other"))]
    places += sorted(folder.glob("EMD-*/masks"))
    found = [file for place in places if place.is_dir() for file in sorted(place.iterdir())]
    entries = named([file for file in found if file.is_file() and NAME.fullmatch(file.name) and file.name[0] != "."])
    if not entries:
        raise FileNotFoundError(
            f"{folder} has no .map or .mrc file (also .gz, .bz2), in itself, in maps/ or in EMD-*/map/: give such a "
            "folder, a map, or a manifest.csv with the columns id and map as data.path"
        )
    return entries


def named(files: Sequence[Path]) -> list[Entry]:
    """Entries from names of files; of two files for the same thing the first is taken."""
    found: dict[str, dict[str, Path]] = {}
    for file in files:
        name = NAME.fullmatch(file.name)
        stem = name["stem"] if name else file.name.split(".")[0]
        half, mask = HALF.search(stem), MASK.search(stem)
        role = f"half{half[1]}" if half else "mask" if mask else "map"
        files_of = found.setdefault(MASK.sub("", HALF.sub("", stem)), {})
        if role in files_of:
            log.warning("%s is left aside: %s is taken for the %s", file.name, files_of[role].name, role)
        files_of.setdefault(role, file)
    entries = []
    for id, roles in found.items():
        if set(roles) == {"mask"}:
            log.warning("%s is left aside: it is a mask without a map", roles["mask"].name)
        else:
            accession = ACCESSION.match(id)
            entries.append(Entry(id, **roles, cluster=f"EMD-{accession[1]}" if accession else id))
    return entries


# ---- manifests


def read_manifest(path: Path | str) -> list[Entry]:
    """The entries of a CSV file with the columns `id`, `map` and any other of `COLUMNS`; paths are relative to it.

    Raises ValueError naming the file, the line and the column.
    """
    path = regular_file(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True, restkey="")
            _check_columns(path, rows.fieldnames or [])
            entries = [_entry(path, rows.line_num, row) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV in UTF-8 ({error}): save it as such") from error
    if not entries:
        raise ValueError(f"{path} has no row: add a map for each")
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:
            raise ValueError(f"{path}: the id {entry.id} stands in two rows: delete one")
        seen.add(entry.id)
    return entries


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    unknown = [column for column in columns if column not in COLUMNS]
    missing = [column for column in ("id", "map") if column not in columns]
    if unknown or missing:
        wrong = f"no column {missing[0]}" if missing else f"an unknown column {unknown[0]!r}"
        raise ValueError(f"{path} has {wrong}: the first line names {', '.join(COLUMNS)}, of which id and map must be")


def _entry(path: Path, line: int, row: dict) -> Entry:
    where = f"{path}, line {line}"
    if "" in row or None in row.values():
        raise ValueError(f"{where} has more or fewer fields than the first line: put values with a comma in quotes")
    given = {column: value.strip() for column, value in row.items() if value.strip()}
    for column in ("id", "map"):
        if column not in given:
            raise ValueError(f"{where}: column {column} is empty, fill it in or delete the row")
    files = {
        name: _file(where, name, path.parent / given[name])
        for name in ("map", "half1", "half2", "mask")
        if name in given
    }
    numbers = {
        name: _number(where, name, given[name]) for name in ("voxel_size", "resolution", "contour") if name in given
    }
    if ("half1" in files) != ("half2" in files):
        raise ValueError(f"{where}: one half map without the other: give half1 and half2, or neither")
    if given.get("split", "train") not in PARTS:
        raise ValueError(f"{where}: split is {given['split']!r}, and there are {', '.join(PARTS)}")
    return Entry(
        given["id"],
        **files,
        **numbers,
        split=given.get("split"),
        cluster=given.get("cluster", given["id"]),
        listed=True,
    )


def _file(where: str, column: str, file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{where}: {column} is {file}, which is no file: correct it")
    return file


def _number(where: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or (value <= 0 and column != "contour"):
        raise ValueError(f"{where}: {column} is {text!r}: give a number" + (" above 0" if column != "contour" else ""))
    return value


# ---- what belongs together


def check_same_grid(first: MapRecord, second: MapRecord) -> None:
    """Raise MapFormatError, naming both files and both values, unless two maps lie on one grid in one place."""
    different = {
        "shape (z, y, x)": first.voxels.shape != second.voxels.shape,
        "voxel size in A": not np.allclose(first.voxel_sizes, second.voxel_sizes, rtol=1e-3, atol=0),
        "position in A": not np.allclose(first.offset, second.offset, rtol=0, atol=SAME_PLACE * first.voxel_size),
    }
    values = {
        "shape (z, y, x)": (first.voxels.shape, second.voxels.shape),
        "voxel size in A": (first.voxel_sizes, second.voxel_sizes),
        "position in A": (first.offset, second.offset),
    }
    for what, differs in different.items():
        if differs:
            one, other = (f"({', '.join(f'{number:.6g}' for number in value)})" for value in values[what])
            raise MapFormatError(
                first.path, f"and {second.path} differ in {what}, {one} and {other}: give files of one reconstruction"
            )


def divided(entries: Sequence[Entry], fractions: Sequence[float], seed: int) -> dict[str, list[Entry]]:
    """Entries by part: as the manifest says, else whole clusters in a seeded order, at least one of them in each part.

    Raises ValueError when there are too few clusters, or one of them is in two parts of a manifest.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"data.split={list(fractions)}: three shares for {', '.join(PARTS)} that sum to 1")
    given: dict[str, str] = {}
    for entry in entries:
        if entry.split and given.setdefault(entry.cluster, entry.split) != entry.split:
            raise ValueError(
                f"the cluster {entry.cluster} is in the splits {given[entry.cluster]} and {entry.split}: keep it in one"
            )
    free = sorted({entry.cluster for entry in entries} - given.keys())
    order = [free[i] for i in np.random.default_rng(seed % 2**63).permutation(len(free))]
    known = given.values() if free else PARTS
    held = [0 if part in known else max(1, round(share * len(free))) for part, share in zip(PARTS, fractions)]
    if held[1] + held[2] + ("train" not in known) > len(free):
        raise ValueError(
            f"{len(entries)} maps of {len(given) + len(free)} clusters cannot be divided into {', '.join(PARTS)}: give "
            "more maps, or a manifest with a column split"
        )
    part_of = {**given, **dict.fromkeys(order, "train")}
    part_of |= dict.fromkeys(order[: held[1]], "val") | dict.fromkeys(order[held[1] : held[1] + held[2]], "test")
    return {part: [entry for entry in entries if part_of[entry.cluster] == part] for part in PARTS}
