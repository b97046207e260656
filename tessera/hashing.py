"""A file for writing that is hashed while it is written."""

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_ONCE = 2**16  # bytes below which a second thread costs more than it saves


class Hashing:
    """A file for writing; a second thread computes the SHA-256 of what is written at the same time.

    `failed` is the error of a write that did not succeed: torch.save may report it as one of its own.
    """

    def __init__(self, file: Any) -> None:
        self.file, self._digest = file, hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        if len(data) < AT_ONCE:
            self._digest.update(data)
            return self._to_file(data)
        # waited for: the memory behind `data` is the caller's again when this returns
        hashed = self._thread.submit(self._digest.update, data)
        try:
            return self._to_file(data)
        finally:
            hashed.result()

    def _to_file(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()

    def hexdigest(self) -> str:
        """The digest of all that was written; nothing can be written after it."""
        self._thread.shutdown()
        return self._digest.hexdigest()


@contextmanager
def without_crc32() -> Iterator[None]:
    """Let torch.save leave out the checksums of its archive, which a SHA-256 of the whole file makes needless."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def save(value: Any, file: Hashing, path: Path) -> None:
    """Write `value` as torch.load reads it. Raises OSError, with the bytes needed and free, where the disk is full."""
    try:
        with without_crc32():
            torch.save(value, file)
    except (OSError, RuntimeError) as error:  # torch.save may report a failed write as an error of its archive
        if getattr(file.failed, "errno", None) in FULL:
            raise OSError(_no_room(value, path)) from error
        raise file.failed or error from None


def _no_room(value: Any, path: Path) -> str:
    disk = os.statvfs(path.parent)
    free, needed = disk.f_bavail * disk.f_frsize, _size(value)
    return (
        f"{path} could not be written: it needs {needed:,} bytes, and {free:,} are free there; make room and start the "
        "same command again: earlier checkpoints are intact"
    )


def _size(value: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(_size(part) for part in parts)
