"""Stopping when asked to. In training the step is finished and saved first, on all processes together."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from tessera import ranks

# Ctrl-C; pre-emption; SLURM's warning before the time limit (sbatch --signal=USR1@120)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class Stopped(SystemExit):
    """The run ends because it was asked to. `code` is the exit status, `signal` what asked."""

    def __init__(self, number: int) -> None:
        super().__init__(STATUS[signal.Signals(number)])
        self.signal = signal.Signals(number)


class Stop:
    """Hears the signals. Between `defer` and `at_once` it notes one; otherwise it raises Stopped where the code is."""

    def __init__(self) -> None:
        self.asked = 0
        self._deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals come here; afterwards they go where they went before."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only a main thread hears signals
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            for number in SIGNALS:
                signal.signal(number, self._hear)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def defer(self) -> None:
        """From here on there is something to save before stopping."""
        self._deferred = True

    def at_once(self) -> None:
        """From here on nothing would be lost by stopping."""
        self._deferred = False

    def agreed(self) -> int:
        """The signal that any process was asked with, 0 for none; every process calls it."""
        return ranks.largest(self.asked)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or (number == signal.SIGINT and self.asked == number):
            raise Stopped(number)
        if ranks.rank() == 0 and not self.asked:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            # print is not safe here: the signal may have come in the middle of another one
            os.write(2, f"\nstopping after this step, to save it first{again}\n".encode())
        self.asked = number


STOP = Stop()  # one, as signals come to a process


def farewell(stopped: Stopped) -> str:
    """What a stopped run says last; under SLURM, a job warned of its time limit is queued again."""
    how = "interrupted" if stopped.signal == signal.SIGINT else f"stopped by {stopped.signal.name}"
    said = f"{how}: the same command continues from the last checkpoint and the answers sampled so far"
    if stopped.signal == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
        said += f"; {_requeue()}"
    return said


def _requeue() -> str:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_]+", job):
        return f"SLURM_JOB_ID={job} is no job number, so it is not queued again"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        return f"job {job} is queued again"
    except (OSError, subprocess.CalledProcessError) as error:
        return f"job {job} could not be queued again ({(getattr(error, 'stderr', '') or str(error)).strip()})"


def last_words(stopped: Stopped) -> int:
    """Say farewell on process 0 and return the exit status; from here on no signal interrupts."""
    with suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if ranks.rank() == 0:
        print(f"\n{farewell(stopped)}", file=sys.stderr, flush=True)
    return stopped.code
