"""Files that are hashed while they are written, and what is said where there is no room for one."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_ONCE = 2**22  # bytes by which the digest follows what is written


class Hashing:
    """A file for writing; a second thread reads behind the writer, out of the page cache, and computes the SHA-256.

    So the digest costs no time while the disk does its part. `failed` is the error of a write that did not succeed:
    torch.save may report it as one of its own.
    """

    def __init__(self, file: Any, thread: Executor) -> None:
        self.file, self.failed = file, None
        self._digest, self._thread, self._followed = hashlib.sha256(), thread, []
        self._written = self._handed = 0

    def write(self, data: Any) -> int:
        data = memoryview(data)
        for begin in range(0, len(data), AT_ONCE):
            self._write(data[begin : begin + AT_ONCE])
        return len(data)

    def _write(self, data: memoryview) -> None:
        try:
            self._written += self.file.write(data)
            if self._written - self._handed >= AT_ONCE:
                self.flush()
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()
        self._followed.append(self._thread.submit(self._follow, self._handed, self._written))
        self._handed = self._written

    def _follow(self, begin: int, end: int) -> None:
        while begin < end:
            data = os.pread(self.file.fileno(), min(end - begin, AT_ONCE), begin)
            if not data:
                raise OSError(f"{self.file.name} is shorter than what was written to it")
            self._digest.update(data)
            begin += len(data)

    def hexdigest(self) -> str:
        """The digest of all that was flushed."""
        for followed in self._followed:
            followed.result()
        return self._digest.hexdigest()


def write_through(path: Path, write: Callable[[Hashing], Any]) -> dict[str, Any]:
    """Call `write(file)` on a new file and sync it; what a manifest records of it: bytes and sha256. Raises OSError."""
    with path.open("w+b") as file, ThreadPoolExecutor(max_workers=1) as thread:
        hashing = Hashing(file, thread)
        write(hashing)
        hashing.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": hashing.hexdigest()}


@contextmanager
def without_crc32() -> Iterator[None]:
    """Let torch.save leave out the checksums of its archive, which a SHA-256 of the whole file makes needless."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def save(value: Any, file: Hashing) -> None:
    """Write `value` as torch.load reads it. Raises OSError where the file cannot be written."""
    try:
        with without_crc32():
            torch.save(value, file)
    except RuntimeError as error:  # torch.save may report a failed write as an error of its archive
        raise file.failed or error from None


@contextmanager
def room_for(path: Path, needed: int) -> Iterator[None]:
    """Turn the error of a full disk into a sentence with the bytes needed and free.

    To be put around everything up to the closing of the file: what is buffered may fail only there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        disk = os.statvfs(path.parent)
        raise OSError(
            f"{path} could not be written: it needs {needed:,} bytes, and {disk.f_bavail * disk.f_frsize:,} are free "
            "there; make room and start the same command again: earlier checkpoints are intact"
        ) from error


def size(value: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(size(part) for part in parts)
