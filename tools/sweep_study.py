"""The folder of a study: who carries out which trial, on any number of machines that share the folder.

    journal.log     the study, in Optuna's journal
    study.lock      held while a trial is handed out
    agents/<id>.lock   held by an agent as long as it lives
    trials/<n>.lock    held by the process of a trial as long as it lives
    trials/<n>.log     what the trial printed
    trials/<n>.run     the path of its run's folder

All locks are the operating system's and end with their process, however it ends. A trial is under way and its agent's
lock is free: it is abandoned, and the next agent that asks carries it on with the same parameters.
"""

import fcntl
import os
import secrets
import shlex
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from tools.sweep_format import Parameter, Sweep

FIRST_FAILURES = 3  # so many failed trials and none that ended: something is wrong with all of them
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def held(path: Path) -> IO[str] | None:
    """The file at `path`, locked; None while somebody else holds it. Closing it ends the lock."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def sign(file: IO[str], pid: int) -> None:
    """Say in a lock which process holds it, and where."""
    file.truncate(0)
    file.write(f"{pid} {socket.gethostname()}")
    file.flush()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock at `path` and hold it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JournalLock:
    """Optuna's lock around an append to its journal; one that a killed agent leaves neither behind nor half a line in.

    (Optuna's own is a symbolic link that outlives its process; others wait half a minute before they break it.)
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.path = journal.with_name("journal.lock")
        self.file: IO[str] | None = None

    def acquire(self) -> bool:
        self.file = self.path.open("a")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self._mend()
        return True

    def release(self) -> None:
        self.file.close()

    def _mend(self) -> None:
        with self.journal.open("rb+") as journal:
            if journal.seek(0, os.SEEK_END) == 0:
                return
            journal.seek(-1, os.SEEK_END)
            if journal.read(1) != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)


class ByNumber(BaseSampler):
    """Grid and random search: a trial's point is a function of its number, so no two agents can draw the same."""

    def __init__(self, point: Callable[[int], dict[str, Any]]) -> None:
        self.point = point

    def infer_relative_search_space(self, study, trial) -> dict[str, Any]:
        return {}

    def sample_relative(self, study, trial, search_space) -> dict[str, Any]:
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution) -> Any:
        return self.point(trial.number)[param_name]


def sampler(sweep: Sweep) -> BaseSampler:
    """Who proposes trials. TPE counts the trials that are running as bad, so that agents do not crowd at one point."""
    return TPESampler(constant_liar=True) if sweep.method == "bayes" else ByNumber(sweep.point)


def pruner(sweep: Sweep) -> BasePruner:
    """Who stops trials early: the rungs of W&B's Hyperband are those of successive halving."""
    if sweep.early_stop is None:
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=sweep.early_stop.first, reduction_factor=sweep.early_stop.eta)


def suggest(trial: optuna.Trial, axis: Parameter) -> Any:
    """The trial's coordinate on an axis; the one that it has, where an agent that was killed came so far."""
    if axis.choices:
        return trial.suggest_categorical(axis.name, axis.choices)
    if axis.whole:
        return trial.suggest_int(axis.name, int(axis.low), int(axis.high))
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


class StudyFolder:
    """A sweep and the folder in which it is carried out. Every process opens its own.

    `limit` is the number of trials from which on no new one is handed out, `began` when the command was given.
    """

    def __init__(self, sweep: Sweep, folder: Path, limit: int | None, began: datetime) -> None:
        self.sweep, self.folder, self.limit, self.began = sweep, folder, limit, began
        for below in ("agents", "trials"):
            (folder / below).mkdir(parents=True, exist_ok=True)
        journal = folder / "journal.log"
        with locked(folder / "study.lock"):
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalLock(journal))),
                study_name="sweep",
                load_if_exists=True,
                direction="maximize" if sweep.maximize else "minimize",
                sampler=sampler(sweep),
                pruner=pruner(sweep),
            )
            self._claim()

    def _claim(self) -> None:
        owner = self.study.user_attrs.get("digest")
        if owner is None:
            self.study.set_user_attr("digest", self.sweep.digest)
            self.study.set_user_attr("file", str(self.sweep.path))
        elif owner != self.sweep.digest:
            raise ValueError(
                f"{self.sweep.path}: {self.folder} belongs to another sweep, that of {self.study.user_attrs['file']} "
                "as it was then; give another --folder"
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials that were handed out."""
        return self.study.get_trials(deepcopy=False)

    def place(self, number: int, ending: str) -> Path:
        """The file of a trial."""
        return self.folder / "trials" / f"{number}.{ending}"

    def join(self) -> tuple[str, IO[str]]:
        """A new agent's id, and its lock, which lives as long as the file is open."""
        agent = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        lock = held(self.folder / "agents" / f"{agent}.lock")
        sign(lock, os.getpid())
        return agent, lock

    def ask(self, agent: str) -> optuna.Trial | None:
        """The next trial, an abandoned one first; None when there is nothing to hand out."""
        with locked(self.folder / "study.lock"):
            trial = self._abandoned() or self._new()
            if trial:
                trial.set_user_attr("agent", agent)
                arguments = self.sweep.arguments({axis.name: suggest(trial, axis) for axis in self.sweep.axes})
                trial.set_user_attr("arguments", arguments)
                command = self.sweep.words(arguments, self.place(trial.number, "json"))
                trial.set_user_attr("command", shlex.join(command))
            return trial

    def _abandoned(self) -> optuna.Trial | None:
        running = [trial for trial in self.trials if trial.state == TrialState.RUNNING]
        left = next((trial for trial in running if not self._cared_for(trial)), None)
        return left and optuna.Trial(self.study, left._trial_id)

    def _cared_for(self, trial: FrozenTrial) -> bool:
        agent = trial.user_attrs.get("agent")
        if agent is None:  # killed while it was handed out, under the lock that is ours now
            return False
        lock = held(self.folder / "agents" / f"{agent}.lock")
        if lock:
            lock.close()
        return lock is None

    def _new(self) -> optuna.Trial | None:
        full = self.limit is not None and len(self.trials) >= self.limit
        return None if full or self.reached() or self.hopeless() else self.study.ask()

    def reached(self) -> bool:
        """Whether a trial has reached the metric's target."""
        values = [trial.value for trial in self.trials if trial.state == TrialState.COMPLETE]
        target, sign = self.sweep.target, 1 if self.sweep.maximize else -1
        return target is not None and any(sign * value >= sign * target for value in values)

    def running(self) -> bool:
        """Whether a trial is still under way, here or elsewhere."""
        return any(trial.state == TrialState.RUNNING for trial in self.trials)

    def hopeless(self) -> str | None:
        """Why no trial of this sweep can end well, judged by those since it was started: a sentence, or None."""
        new = [trial for trial in self.trials if (trial.datetime_complete or datetime.min) >= self.began]
        failed = [trial for trial in new if trial.state == TrialState.FAIL]
        if len(failed) < len([trial for trial in new if trial.state.is_finished()]):
            return None
        unlogged = next((reason for t in failed if (reason := t.user_attrs.get("unlogged"))), None)
        if unlogged and not any(trial.state in ENDED for trial in self.trials):
            return unlogged
        if len(failed) < FIRST_FAILURES:
            return None
        last = failed[-1]
        failure = last.user_attrs.get("failure")
        return (
            f"program {self.sweep.program} failed in the first {len(failed)} trials ({failure}); "
            f"read {self.place(last.number, 'log')}; repaired, the same command goes on with the trials that are left"
        )
