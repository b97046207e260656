"""An agent: asks for a trial, carries it out, tells, until there is nothing left."""

import multiprocessing
import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

from tools.sweep_format import Sweep
from tools.sweep_study import StudyFolder
from tools.sweep_trial import POLL, carry_out


class Asked:
    """Whether this process should stop: it was told to, or the one that started it is gone."""

    def __init__(self) -> None:
        self.parent = multiprocessing.parent_process().pid
        self.told = False
        signal.signal(signal.SIGTERM, self._tell)
        signal.signal(signal.SIGINT, self._tell)

    def _tell(self, number: int, frame: object) -> None:
        self.told |= number == signal.SIGTERM  # Ctrl-C is for the one that started us, which passes it on

    def __call__(self) -> bool:
        return self.told or os.getppid() != self.parent


def work(sweep: Sweep, folder: Path, limit: int | None, began: datetime) -> None:
    """Carry out trials; with none left to hand out, stay for those of agents that may yet be killed."""
    stopping = Asked()
    try:
        _work(StudyFolder(sweep, folder, limit, began), stopping)
    except OSError as error:  # a full disk, a share that is gone
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _work(home: StudyFolder, stopping: Asked) -> None:
    agent, lock = home.join()
    with lock:
        while not stopping():
            trial = home.ask(agent)
            if trial:
                carry_out(home, trial, stopping)
            elif home.hopeless() or not home.running():
                return
            else:
                time.sleep(POLL)
