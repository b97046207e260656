"""MRC/CCP4 maps (MRC2014) as arrays z, y, x with their place in space, through mrcfile; and back, whole or not at all.

mrcfile reads what the bytes say. Here is what they mean: axes in any order, position by origin or by start indices, a
voxel size from the cell and its sampling, unsigned bytes of IMOD; and one sentence for every file that is no density.
"""

import bz2
import gzip
import io
import os
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import mrcfile
import numpy as np
from jaxtyping import Float32
from mrcfile.constants import MAP_ID, MAP_ID_OFFSET_BYTES
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.mrcinterpreter import MrcInterpreter
from mrcfile.utils import byte_order_from_machine_stamp

from datamodules.jsonl import OPENINGS, regular_file
from datamodules.shards import appearing_whole

HEADER_BYTES = HEADER_DTYPE.itemsize
BYTES = {0: 1, 1: 2, 2: 4, 6: 2, 12: 2}  # of a voxel, by the modes that hold a density
OTHER_MODES = {3: "a Fourier transform (complex int16)", 4: "a Fourier transform (complex64)", 101: "4-bit integers"}
IMOD_STAMP, IMOD_PLACE, IMOD_SIGNED = 1146047817, 152, 1
VOXEL_SIZES = (0.2, 20.0)  # angstrom: beyond that a header is taken for wrong
WORKING_BYTES = 16  # a voxel needs of memory: as it is stored, as float32, and in a transform
LARGEST_EDGE, LARGEST_EXTENDED = 2**16, 2**26  # voxels, bytes
NAN_POLICIES = ("error", "zero")
CATCHING = threading.Lock()  # what warnings do is one state for all threads


class Remedy(Enum):
    """What a setting of a training run would do about a map; what has other settings says it in its own words."""

    VOXEL_SIZE = "set it in the header, or give data.assume_voxel_size"
    CUBES = "set data.allow_anisotropic=true to resample it"
    ZEROS = "set data.nan_policy=zero to read them as 0"
    FINER = "lower data.voxel_size"
    OTHER_GRID = "change data.voxel_size"


class MapFormatError(ValueError):
    """A file that is no readable density map; the message names it, what is wrong and what to do.

    What to do is the end of `fault`, or a `remedy` where it depends on who reads.
    """

    def __init__(self, path: Path | str | None, fault: str, remedy: Remedy | None = None) -> None:
        super().__init__(path, fault, remedy)

    def __str__(self) -> str:
        return self.told({remedy: remedy.value for remedy in Remedy})

    def told(self, remedies: Mapping[Remedy, str]) -> str:
        """The sentence, with its remedy in the words of `remedies`."""
        path, fault, remedy = self.args
        return f"{path} {fault}" if remedy is None else f"{path} {fault}: {remedies[remedy]}"


class NoDensityError(MapFormatError):
    """A sound file of another kind: an image, a stack, a Fourier transform, a crystal with an oblique cell."""


@dataclass(frozen=True, eq=False)
class MapRecord:
    """A density `voxels` (z, y, x) with its place in space; triples are (x, y, z), lengths in angstrom.

    `origin` and `nstart` are what the file says, `nstart` reordered to x, y, z; `voxel_size` is the mean of
    `voxel_sizes`, which are equal unless anisotropic maps were allowed. `axes`, `mode`, `space_group` and `labels` are
    those of the file, `warnings` what was odd about it.
    """

    voxels: Float32[np.ndarray, "z y x"]
    voxel_sizes: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    nstart: tuple[int, int, int] = (0, 0, 0)
    path: Path | None = None
    axes: tuple[int, int, int] = (1, 2, 3)
    mode: int = 2
    space_group: int = 1
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def voxel_size(self) -> float:
        return sum(self.voxel_sizes) / 3

    @property
    def offset(self) -> tuple[float, float, float]:
        """Where the voxel (0, 0, 0) is: `origin`, or where that is zero the start indices times the voxel size."""
        return self.origin if any(self.origin) else self._by_start

    @property
    def _by_start(self) -> tuple[float, float, float]:
        x, y, z = (start * size for start, size in zip(self.nstart, self.voxel_sizes))
        return x, y, z


def read_map(
    path: Path | str,
    *,
    voxel_size: float | None = None,
    allow_anisotropic: bool = False,
    nan_policy: str = "error",
    memory: int | None = None,
) -> MapRecord:
    """The density in a file, plain, gzip or bzip2 by its content.

    `voxel_size` (angstrom) replaces what the header says. `nan_policy="zero"` sets voxels that are not finite to zero
    and says how many. `memory` bytes may be used, by default those that are free. Raises FileNotFoundError,
    `NoDensityError` where the file is of another kind and `MapFormatError` where it is damaged or has no meaning.
    """
    if nan_policy not in NAN_POLICIES:
        raise ValueError(f"data.nan_policy={nan_policy}: there are {', '.join(NAN_POLICIES)}")
    path, found = regular_file(path), []
    with _opened(path) as stream:
        header = _header(path, stream.read(HEADER_BYTES), found)
        _check_size(path, stream, header, available_memory() if memory is None else memory)
        data = _data(path, stream, found)
    axes = _axes(path, header, found)
    order = [axes[::-1].index(axis) for axis in (3, 2, 1)]
    voxels = np.ascontiguousarray(_as_density(header, data).transpose(order), np.float32)
    voxels = _finite(path, voxels, nan_policy, found)
    _check_statistics(path, header, voxels, found)
    starts = [int(header[name]) for name in ("nxstart", "nystart", "nzstart")]
    record = MapRecord(
        voxels,
        _voxel_sizes(path, header, voxels.shape[::-1], voxel_size, allow_anisotropic, found),
        _origin(path, header),
        tuple(starts[axes.index(axis)] for axis in (1, 2, 3)),
        path,
        tuple(int(header[name]) for name in ("mapc", "mapr", "maps")),
        int(header["mode"]),
        int(header["ispg"]),
        tuple(_text(label) for label in header["label"] if label.strip(b" \0")),
    )
    if any(record.origin) and any(record.nstart) and not np.allclose(record.origin, record._by_start, atol=0.1):
        found.append(
            f"origin {_triple(record.origin)} A and start indices {record.nstart} disagree: the origin is used; "
            "set it to zero if the indices are right"
        )
    return MapRecord(**{**vars(record), "warnings": tuple(found)})


def save_map(path: Path | str, record: MapRecord) -> None:
    """Write float32 in the order x, y, z with voxel size, origin and start indices as they are, whole or not at all.

    Compressed where the name ends in .gz or .bz2. Raises MapFormatError when a voxel is not finite.
    """
    path = Path(path)
    if not np.isfinite(record.voxels).all():
        raise MapFormatError(path, "would have voxels that are not finite, so it is not written: look at what made it")
    compression = {".gz": "gzip", ".bz2": "bzip2"}.get(path.suffix)
    with (
        appearing_whole(path) as file,
        mrcfile.new(file.name, compression=compression, overwrite=True) as mrc,
    ):
        mrc.set_data(np.asarray(record.voxels, np.float32))
        mrc.set_volume()
        mrc.header.cella = tuple(size * n for size, n in zip(record.voxel_sizes, record.voxels.shape[::-1]))
        mrc.header.origin = record.origin
        mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = record.nstart
        # mrcfile's own label has the time in it, and equal maps should be equal files
        mrc.header.label[0] = "written by Tessera"


def available_memory() -> int:
    """Bytes that can be had without swapping; of the whole machine where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- from bytes to header and data


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a map, decompressed where they are gzip or bzip2 and no map as they are."""
    try:
        with path.open("rb") as file:
            start = file.read(MAP_ID_OFFSET_BYTES + len(MAP_ID))
        packed = start[MAP_ID_OFFSET_BYTES:] != MAP_ID
        opener = (
            gzip.open if packed and start[:2] == b"\x1f\x8b" else bz2.open if packed and start[:3] == b"BZh" else open
        )
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MapFormatError(path, f"is a broken or truncated compressed file ({error}): download it again") from error
    except OSError as error:  # bzip2 has no error of its own
        raise MapFormatError(path, f"cannot be read ({error.strerror or error}): download it again") from error


def _header(path: Path, start: bytes, found: list[str]) -> np.void:
    """The header in the byte order of its machine stamp, or in the other one where only that gives a known mode."""
    if not start:
        raise MapFormatError(path, "is empty: download or write it again")
    for opening, remedy in OPENINGS.items():
        if start.lstrip().startswith(opening):
            raise MapFormatError(path, remedy)
    if len(start) < HEADER_BYTES:
        raise MapFormatError(
            path, f"ends within its header, after {len(start)} of {HEADER_BYTES} bytes: download it again"
        )
    little, big = (np.frombuffer(start, HEADER_DTYPE.newbyteorder(order))[0] for order in "<>")
    try:
        stamped = byte_order_from_machine_stamp(little["machst"])
    except ValueError:
        found.append("no valid machine stamp: the byte order is guessed")
        stamped = "<"
    first, second = (little, big) if stamped == "<" else (big, little)
    if _has_mode(first) or not _has_mode(second):
        header = first
    else:
        found.append("the machine stamp contradicts the byte order of the header: the latter is used")
        header = second
    if start[MAP_ID_OFFSET_BYTES:][:3] != MAP_ID[:3]:
        if not _plausible(header):
            raise MapFormatError(path, "is no MRC or CCP4 map (no `MAP ` at byte 208): give a .mrc, .map or .ccp4 file")
        found.append("no `MAP ` at byte 208, as in files from before 2000")
    return header


def _has_mode(header: np.void) -> bool:
    return int(header["mode"]) in BYTES or int(header["mode"]) in OTHER_MODES


def _shape(header: np.void) -> tuple[int, int, int]:
    """Columns, rows and sections."""
    return int(header["nx"]), int(header["ny"]), int(header["nz"])


def _plausible(header: np.void) -> bool:
    return _has_mode(header) and all(0 < edge < LARGEST_EDGE for edge in _shape(header))


def _check_size(path: Path, stream: io.BufferedIOBase, header: np.void, memory: int) -> None:
    """Refuse by the header alone what is no density, does not fit into the memory or into the file."""
    shape, mode, extended = _shape(header), int(header["mode"]), int(header["nsymbt"])
    if not _has_mode(header):
        raise MapFormatError(path, f"has the unknown mode {mode}: its header is damaged, download it again")
    if mode in OTHER_MODES:
        raise NoDensityError(path, f"holds {OTHER_MODES[mode]}, mode {mode}, and no density: convert it to mode 2")
    size = " x ".join(map(str, shape))
    if not all(0 < edge < LARGEST_EDGE for edge in shape):
        raise MapFormatError(path, f"has {size} voxels by its header, which is damaged: download it again")
    if not 0 <= extended <= LARGEST_EXTENDED:
        raise MapFormatError(path, f"has an extended header of {extended} bytes by its header, which is damaged")
    if shape[2] == 1:
        raise NoDensityError(path, f"is an image of {size} pixels: give a volume")
    _check_stack(path, header)
    voxels = shape[0] * shape[1] * shape[2]
    if voxels * WORKING_BYTES > memory:
        raise MapFormatError(
            path,
            f"has {size} voxels, for which {voxels * WORKING_BYTES / 1e9:.1f} GB of memory are needed and "
            f"{memory / 1e9:.1f} are free: bin it or cut out a part first (IMOD's newstack, trimvol)",
        )
    if isinstance(stream, io.BufferedReader):
        there, needed = path.stat().st_size, HEADER_BYTES + extended + voxels * BYTES[mode]
        if there < needed:
            raise MapFormatError(path, _cut_short(there, needed))


def _cut_short(there: int, needed: int) -> str:
    return f"has {there:,} bytes and should have {needed:,} by its header: it is cut short, download it again"


def _check_stack(path: Path, header: np.void) -> None:
    group, sections, each = int(header["ispg"]), int(header["nz"]), int(header["mz"])
    if 401 <= group <= 630 and each > 0 and sections // each != 1:
        raise NoDensityError(
            path, f"is a stack of {sections / each:g} volumes (space group {group}): write each into a file of its own"
        )


def _data(path: Path, stream: io.BufferedIOBase, found: list[str]) -> np.ndarray:
    """The voxels as mrcfile reads them, with what it says about them."""
    stream.seek(0)
    with CATCHING, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            mrc = MrcInterpreter(stream, permissive=True)
        except (ValueError, MemoryError, OverflowError) as error:
            raise MapFormatError(path, f"cannot be read ({' '.join(str(error).split())}): download it again") from error
    if mrc.data is None:
        reason = str(said[-1].message) if said else "no data"
        raise MapFormatError(path, f"is cut short or damaged ({reason}): download it again")
    if stream.read(1):
        found.append("the file is longer than its header says")
    return mrc.data.reshape(mrc.data.shape[-3:])


def _as_density(header: np.void, data: np.ndarray) -> np.ndarray:
    """IMOD's bytes are unsigned where it has left its stamp and not the flag for signed ones."""
    order = "little" if header.dtype["mode"].str[0] in "<=|" else "big"
    stamp, flags = (
        int.from_bytes(header.tobytes()[place : place + 4], order) for place in (IMOD_PLACE, IMOD_PLACE + 4)
    )
    unsigned = data.dtype == np.int8 and stamp == IMOD_STAMP and not flags & IMOD_SIGNED
    return data.view(np.uint8) if unsigned else data


# ---- what the header means


def _axes(path: Path, header: np.void, found: list[str]) -> tuple[int, int, int]:
    """Which of x, y, z (1, 2, 3) the columns, rows and sections are."""
    axes = tuple(int(header[name]) for name in ("mapc", "mapr", "maps"))
    if axes == (0, 0, 0):
        found.append("the order of the axes is not set: x, y, z is assumed")
        return 1, 2, 3
    if sorted(axes) != [1, 2, 3]:
        raise MapFormatError(path, f"has the axes {axes} by its header, where 1, 2 and 3 are meant: it is damaged")
    return axes


def _voxel_sizes(
    path: Path,
    header: np.void,
    shape: tuple[int, int, int],
    given: float | None,
    allow_anisotropic: bool,
    found: list[str],
) -> tuple[float, float, float]:
    angles = [float(header["cellb"][name]) for name in ("alpha", "beta", "gamma")]
    if any(angles) and not np.allclose(angles, 90, atol=1e-3):
        raise NoDensityError(
            path,
            f"has a cell with the angles {_triple(angles)}, not 90: a crystal's map, which is not read here; resample "
            "it onto an orthogonal grid first",
        )
    if given is not None:
        _check_voxel_size(path, given, "as it is given")
        return given, given, given
    cell = [float(header["cella"][name]) for name in "xyz"]
    sampling = [int(header[name]) for name in ("mx", "my", "mz")]
    if any(intervals <= 0 for intervals in sampling):
        found.append("the sampling of the cell is not set: the cell is taken for the box")
        sampling = list(shape)
    sizes = [length / intervals for length, intervals in zip(cell, sampling)]
    if not all(np.isfinite(sizes)) or min(sizes) <= 0:
        raise MapFormatError(path, f"has no voxel size (cell {_triple(cell)} A)", Remedy.VOXEL_SIZE)
    mean = sum(sizes) / 3
    for size in sizes:
        _check_voxel_size(path, size, "by its header")
    spread = max(abs(size - mean) for size in sizes) / mean
    if allow_anisotropic:
        return sizes[0], sizes[1], sizes[2]
    if spread > 1e-3:
        raise NoDensityError(
            path,
            f"has voxels of {_triple(sizes)} A, which are no cubes",
            Remedy.CUBES,
        )
    if spread > 1e-6:
        found.append(f"voxels of {_triple(sizes)} A, taken for cubes of {mean:.6g}")
        return mean, mean, mean
    return sizes[0], sizes[1], sizes[2]


def _check_voxel_size(path: Path, size: float, says: str) -> None:
    if not VOXEL_SIZES[0] <= size <= VOXEL_SIZES[1]:
        raise MapFormatError(
            path,
            f"has a voxel size of {size:.6g} A {says}, and from {VOXEL_SIZES[0]:g} to {VOXEL_SIZES[1]:g} is usual",
            Remedy.VOXEL_SIZE,
        )


def _origin(path: Path, header: np.void) -> tuple[float, float, float]:
    origin = tuple(float(header["origin"][name]) for name in "xyz")
    if not np.isfinite(origin).all():
        raise MapFormatError(
            path, f"has the origin {_triple(origin)} by its header, which is damaged: download it again"
        )
    return origin


def _finite(path: Path, voxels: np.ndarray, nan_policy: str, found: list[str]) -> np.ndarray:
    low, high = voxels.min(), voxels.max()
    if not np.isfinite([low, high]).all():
        broken = ~np.isfinite(voxels)
        count = f"{np.count_nonzero(broken):,} of {voxels.size:,} voxels"
        if nan_policy == "error":
            raise MapFormatError(path, f"has {count} that are NaN or infinite", Remedy.ZEROS)
        found.append(f"{count} are NaN or infinite and read as 0")
        voxels = np.where(broken, np.float32(0), voxels)
        low, high = voxels.min(), voxels.max()
    if low == high:
        raise MapFormatError(path, f"is {low:g} in every voxel: there is no density in it, so leave it out")
    return voxels


def _check_statistics(path: Path, header: np.void, voxels: np.ndarray, found: list[str]) -> None:
    said = np.array([float(header[name]) for name in ("dmin", "dmax", "dmean")])
    if not said[0] < said[1]:
        return  # not set
    true = np.array([voxels.min(), voxels.max(), voxels.mean(dtype=np.float64)])
    if not np.abs(said - true).max() <= 1e-3 * (true[1] - true[0]):
        found.append(f"header statistics (min, max, mean) are {_triple(said)} and those of the data {_triple(true)}")


def _triple(values: object) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"


def _text(label: bytes) -> str:
    return label.decode("latin-1").strip(" \0")
