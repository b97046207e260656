"""Files of tokens: nanoGPT's raw `train.bin`, and the shards of llm.c and modded-nanogpt, which begin with a header.

Both hold little-endian unsigned integers. A header is 256 int32: magic, version, number of tokens, then zeros.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datamodules.jsonl import regular_file

HEADER = 256  # int32
HEADER_BYTES = 4 * HEADER
EXAMPLES = 20240522  # magic of llm.c's evaluation files (datamodules/hellaswag.py)
RAW = "<u2"
AT_ONCE = 2**22  # tokens that are read or written together


@dataclass(frozen=True)
class Kind:
    """What a magic number announces: version, type of a token, size of the vocabulary it was made for."""

    version: int
    dtype: str
    vocab_size: int


KINDS = {20240520: Kind(1, "<u2", 50_257), 20240801: Kind(7, "<u4", 128_256)}  # GPT-2's tokens, Llama 3's
GPT2, LLAMA3 = KINDS
# first bytes of what is saved in the place of a file of tokens
IMPOSTORS = {
    b"<!doctype": "an HTML page: download the raw file",
    b"<html": "an HTML page: download the raw file",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run `git lfs pull`",
    b"\x80\x04\x95": "a Python pickle, which is never opened: write the tokens with tools.tokenize_text",
    b"\x93numpy": "a NumPy file: write the tokens with tools.tokenize_text",
}


@dataclass(frozen=True)
class Shard:
    """`count` tokens of type `dtype` from byte `offset` of a file on. `vocab_size` is that of its format."""

    path: Path
    offset: int
    count: int
    dtype: str = RAW
    vocab_size: int = 50_257

    def __len__(self) -> int:
        return self.count

    def part(self, begin: int, end: int) -> "Shard":
        """Tokens `begin` to `end` (exclusive), in place."""
        return replace(self, offset=self.offset + begin * np.dtype(self.dtype).itemsize, count=end - begin)

    def open(self) -> np.ndarray:
        """The tokens, mapped into memory and read when they are touched."""
        if not self.count:
            return np.empty(0, self.dtype)
        # a plain array on the mapping: slicing an np.memmap costs several times as much
        return np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.count))


def open_shard(path: Path | str) -> Shard:
    """A file of tokens, with or without a header, as its first bytes say.

    Raises FileNotFoundError or ValueError when it is missing, empty, cut off, of another format or byte order.
    """
    path = regular_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    _refuse_impostor(path, start)
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    if size >= 4 and int(header[0]) in KINDS:
        return _with_header(path, header, size)
    _refuse_header(path, header)
    if size % 2:
        raise ValueError(f"{path} has {size} bytes, an odd number, and a token has two: write or download it again")
    return Shard(path, 0, size // 2)


def _with_header(path: Path, header: np.ndarray, size: int) -> Shard:
    kind = KINDS[int(header[0])]
    if len(header) < HEADER:
        raise ValueError(f"{path} ends within its header, after {size} of {HEADER_BYTES} bytes: download it again")
    version, count = int(header[1]), int(header[2])
    if version != kind.version:
        raise ValueError(
            f"{path} says version {version} and {kind.version} is the one known here: write it anew with "
            "tools.tokenize_text"
        )
    width = np.dtype(kind.dtype).itemsize
    if count < 1 or size != HEADER_BYTES + width * count:
        raise ValueError(
            f"{path} should have {count} tokens by its header and has {(size - HEADER_BYTES) / width:g}: it is cut "
            "short or damaged, write or download it again"
        )
    return Shard(path, HEADER_BYTES, count, kind.dtype, kind.vocab_size)


def _refuse_impostor(path: Path, start: bytes) -> None:
    if not start:
        raise ValueError(f"{path} is empty: write or download it again")
    for opening, what in IMPOSTORS.items():
        if start.lstrip()[: len(opening)].lower() == opening:
            raise ValueError(f"{path} is {what}")


def _refuse_header(path: Path, header: np.ndarray) -> None:
    """Refuse what has a header that is not one of `KINDS`: as raw tokens it would be 512 tokens of junk."""
    if not len(header):
        return
    magic = int(header[0])
    if magic == EXAMPLES:
        raise ValueError(f"{path} holds examples of an evaluation such as HellaSwag, not a text: give shards of tokens")
    if int(header[:1].byteswap()[0]) in KINDS:
        raise ValueError(f"{path} is big-endian (its magic number is byte-swapped): write it with little-endian bytes")
    named = any(mark in path.name for mark in ("_train_", "_val_", "_test_"))
    zeros = len(header) == HEADER and not header[3:].any()  # 506 tokens of the number 0 in a row are no text
    if named or zeros:
        raise ValueError(
            f"{path} begins with {magic}, which is no magic number known here ({', '.join(map(str, KINDS))}): "
            "write it anew with tools.tokenize_text, or name a file without a header train.bin or val.bin"
        )


# ---- several of them, end to end


class Stream:
    """Tokens of several pieces end to end: files, which each process maps for itself, or arrays in memory."""

    def __init__(self, pieces: Iterable[Shard | np.ndarray]) -> None:
        self.pieces = [piece for piece in pieces if len(piece)]
        self.ends = np.cumsum([0, *map(len, self.pieces)], dtype=np.int64)
        self._opened: tuple[int, list[np.ndarray]] = (0, [])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": (0, [])}

    def part(self, begin: int, end: int) -> "Stream":
        """Tokens `begin` to `end` (exclusive), nothing of them read."""
        cut = []
        for first, piece in zip(self.ends.tolist(), self.pieces):
            low, high = max(begin - first, 0), min(end - first, len(piece))
            if low < high:
                cut.append(piece.part(low, high) if isinstance(piece, Shard) else piece[low:high])
        return Stream(cut)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens `begin` to `end` (exclusive), of the type in which they are kept; a view where that is possible."""
        arrays = self._arrays()
        first = int(np.searchsorted(self.ends, begin, side="right")) - 1
        if end <= self.ends[first + 1]:
            return arrays[first][begin - self.ends[first] : end - self.ends[first]]
        last = int(np.searchsorted(self.ends, end, side="left"))
        read = (array[max(begin - at, 0) : end - at] for at, array in zip(self.ends[first:last], arrays[first:last]))
        return np.concatenate(list(read))

    def windows(self, begins: np.ndarray, width: int) -> np.ndarray:
        """int64 array of shape (len(begins), width): `width` tokens from each of `begins` on."""
        read = np.empty((len(begins), width), np.int64)
        for row, begin in zip(read, begins.tolist()):
            row[:] = self.read(begin, begin + width)
        return read

    def chunks(self) -> Iterator[np.ndarray]:
        """All tokens in order, some millions at a time."""
        for array in self._arrays():
            for begin in range(0, len(array), AT_ONCE):
                yield array[begin : begin + AT_ONCE]

    def histogram(self, size: int) -> np.ndarray:
        """How often each of the tokens 0 to size - 1 occurs, int64 of shape (size,)."""
        counts = np.zeros(size, np.int64)
        for chunk in self.chunks():
            counts += np.bincount(chunk, minlength=size)
        return counts

    def _arrays(self) -> list[np.ndarray]:
        if self._opened[0] != os.getpid():
            self._opened = (os.getpid(), [p.open() if isinstance(p, Shard) else p for p in self.pieces])
        return self._opened[1]


def largest(shard: Shard) -> int:
    """The largest token of a shard, which has one."""
    return max(int(chunk.max()) for chunk in Stream([shard]).chunks())


# ---- writing


@contextmanager
def appearing_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name when it is complete and on the disk, and leaves nothing where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_nanogpt(path: Path, tokens: Stream) -> Path:
    """nanoGPT's format: the tokens as uint16 and nothing else. Raises ValueError for a token above 65,535."""
    with appearing_whole(path) as file:
        _append(file, path, tokens, RAW)
    return path


def write_llmc(path: Path, tokens: Stream, magic: int = GPT2) -> Path:
    """A shard with llm.c's header, for GPT-2's tokens (uint16) or, by its `magic`, Llama 3's (uint32)."""
    header = np.zeros(HEADER, "<i4")
    header[:3] = magic, KINDS[magic].version, len(tokens)
    with appearing_whole(path) as file:
        file.write(header.tobytes())
        _append(file, path, tokens, KINDS[magic].dtype)
    return path


def _append(file: BinaryIO, path: Path, tokens: Stream, dtype: str) -> None:
    if not len(tokens):
        raise ValueError(f"{path} would have no tokens: give more text, or smaller shards")
    for chunk in tokens.chunks():
        if chunk.max() > np.iinfo(dtype).max:
            raise ValueError(f"{path}: the token {chunk.max()} does not fit into {np.dtype(dtype).itemsize} bytes")
        file.write(chunk.astype(dtype, copy=False).tobytes())
