"""What each of several processes tells the others: that it is alive, and where it is."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress

import torch.distributed as dist

PERIOD = 1.0  # seconds between two beats


class Heartbeat(threading.Thread):
    """Writes this process's place into the store that all share, and stops it when its launcher is gone.

    A stopped or killed process falls silent; one that waits for it keeps beating, and can say who is missing.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.place = "starting"
        self._launcher = os.getppid()

    def run(self) -> None:
        while os.getppid() == self._launcher:
            self._beat()
            time.sleep(PERIOD)
        os.kill(os.getpid(), signal.SIGTERM)

    def _beat(self) -> None:
        with suppress(dist.DistError):  # without the store there is nobody to tell
            self.store.set(str(self.rank), json.dumps([time.time(), socket.gethostname(), os.getpid(), self.place]))

    def diagnosis(self, why: str) -> str:
        """A sentence about the process that has been silent longest, and where the others are."""
        beats = {rank: self._last(rank) for rank in range(self.world) if rank != self.rank}
        missing = min(beats, key=lambda rank: beats[rank][0])
        at, host, pid, place = beats[missing]
        silence = time.time() - at
        alive = "still there" if silence < 3 * PERIOD else f"silent for {silence:.0f} s" if at else "never heard of"
        return (
            f"{why}: waited for process {missing} ({alive}; pid {pid} on {host}, last {place}), this one being "
            f"{self.place}; start again, and the run continues from the last checkpoint"
        )

    def _last(self, rank: int) -> tuple[float, str, int, str]:
        with suppress(dist.DistError):
            if self.store.check([str(rank)]):
                return tuple(json.loads(self.store.get(str(rank))))
        return 0.0, "an unknown host", 0, "not heard of"
