"""Hashing what is written, meanwhile."""

import hashlib
import threading
from queue import SimpleQueue
from typing import Any


class Hashing:
    """A file for writing whose SHA-256 is computed meanwhile by a second thread: hashing costs the writer no time."""

    def __init__(self, file: Any) -> None:
        self.file, self._digest, self._queue = file, hashlib.sha256(), SimpleQueue()
        self.failed: OSError | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)
        self._thread.start()

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._queue.put(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()

    def hexdigest(self) -> str:
        """The digest of all that was written; nothing can be written after it."""
        self._queue.put(None)
        self._thread.join()
        return self._digest.hexdigest()

    def _hash(self) -> None:
        while (content := self._queue.get()) is not None:
            self._digest.update(content)
