"""One trial: a process of its own, watched through the folder of its run.

The process finds a path in the environment variable TESSERA_RECORD and writes the path of its run's folder there. In
that folder, the column of the metric in metrics.csv is what the trial logs, and its value in the `metrics` of
results.json, else the last one of the column, is what the trial is worth: what W&B calls the summary.
"""

import csv
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import optuna
from optuna.trial import TrialState

from tessera.words import nearest
from tools.sweep_study import StudyFolder, held, sign

POLL = 0.1  # seconds
PATIENCE = 30  # seconds between asking a process to end and ending it
LEISURE = 20  # a long metrics.csv is read again after so many times the time that reading it took
TAIL = 20  # lines of a failed trial's log that are kept in the study
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT}


@dataclass
class Outcome:
    """What became of a trial; state None where it was left for later."""

    state: TrialState | None
    value: float | None = None
    failure: str | None = None
    unlogged: str | None = None


def carry_out(home: StudyFolder, trial: optuna.Trial, stopping: Callable[[], bool]) -> None:
    """Run a trial's command to its end and tell the study; leave it running there if this agent has to stop."""
    try:
        outcome = _carried_out(home, trial, stopping)
    except (OSError, ValueError) as error:  # a command that does not start, a metric that is no number
        outcome = Outcome(TrialState.FAIL, failure=f"{type(error).__name__}: {error}")
    if outcome.state is None:
        return
    folder = run_folder(home.place(trial.number, "run"))
    trial.set_user_attr("run", folder and str(folder))
    if outcome.failure:
        trial.set_user_attr("failure", outcome.failure)
        trial.set_user_attr("log", tail(home.place(trial.number, "log")))
        trial.set_user_attr("unlogged", outcome.unlogged)
    home.study.tell(trial.number, outcome.value, state=outcome.state)


def _carried_out(home: StudyFolder, trial: optuna.Trial, stopping: Callable[[], bool]) -> Outcome:
    lock = _alone(home.place(trial.number, "lock"), stopping)
    if lock is None:
        return Outcome(None)
    try:
        process = _start(home, trial, lock)
    finally:
        lock.close()
    try:
        outcome = _follow(home, trial, process, stopping)
    except BaseException:
        _terminate(process)
        raise
    return outcome or _ended(home, trial.number, process.returncode, stopping)


def _alone(path: Path, stopping: Callable[[], bool]) -> IO[str] | None:
    """The trial's lock, once the process that a killed agent left at work on it has ended; None when we must stop."""
    asked = time.monotonic()
    while (lock := held(path)) is None and not stopping():
        pid, _, host = path.read_text().partition(" ")
        if pid and host == socket.gethostname():  # its lock is held: it lives, and the number is still its own
            late = time.monotonic() - asked > PATIENCE
            _signal_group(int(pid), signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(POLL)
    return lock


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _start(home: StudyFolder, trial: optuna.Trial, lock: IO[str]) -> subprocess.Popen:
    """The command in a session of its own, its output in the log; `python` is the one that runs the sweep."""
    arguments, json_file = trial.user_attrs["arguments"], home.place(trial.number, "json")
    command = home.sweep.words(arguments, json_file)
    if str(json_file) in command:
        json_file.write_text(json.dumps(arguments))
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    record = str(home.place(trial.number, "run").resolve())
    with home.place(trial.number, "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": search, "TESSERA_RECORD": record},
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    sign(lock, process.pid)
    return process


def _follow(
    home: StudyFolder, trial: optuna.Trial, process: subprocess.Popen, stopping: Callable[[], bool]
) -> Outcome | None:
    """Wait for the end, report what is logged where trials may be pruned; an outcome if the trial was stopped."""
    look = 0.0 if home.sweep.early_stop else math.inf
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
            return None
        if stopping():
            _terminate(process)
            return Outcome(None)
        if (began := time.monotonic()) > look:
            if _falls_behind(home, trial):
                _terminate(process)
                return Outcome(TrialState.PRUNED)
            look = time.monotonic() + LEISURE * (time.monotonic() - began)


def _terminate(process: subprocess.Popen) -> None:
    """SIGTERM to the whole group, and SIGKILL to what is still there after a while."""
    _signal_group(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _falls_behind(home: StudyFolder, trial: optuna.Trial) -> bool:
    """Report the newest logged value, if there is a new one, and ask the pruner."""
    folder = run_folder(home.place(trial.number, "run"))
    values = logged(folder, home.sweep.metric) if folder else []
    last = home.sweep.early_stop.last
    reported = home.study.get_trials(deepcopy=False)[trial.number].last_step or 0
    if len(values) <= reported or (last and len(values) >= last) or math.isnan(values[-1]):
        return False
    trial.report(values[-1], len(values))
    return trial.should_prune()


def _ended(home: StudyFolder, number: int, status: int, stopping: Callable[[], bool]) -> Outcome:
    """What a trial is whose process ended by itself."""
    if status in STOPPED and _about_to_stop(stopping):
        return Outcome(None)
    if status:
        lines = [line for line in tail(home.place(number, "log")).splitlines() if line.strip()]
        how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        return Outcome(TrialState.FAIL, failure=f"{how}: {lines[-1].strip() if lines else 'it printed nothing'}")
    folder, metric = run_folder(home.place(number, "run")), home.sweep.metric
    value = final(folder, metric) if folder else None
    if value is None:
        return Outcome(TrialState.FAIL, failure=f"{metric} was not logged", unlogged=_unlogged(home, folder))
    if math.isnan(value):
        return Outcome(TrialState.FAIL, failure=f"{metric} is not a number at the end")
    return Outcome(TrialState.COMPLETE, value)


def _about_to_stop(stopping: Callable[[], bool]) -> bool:
    """Whether the signal that ended a trial is meant for all of us, as when a machine is taken away."""
    for _ in range(10):
        if stopping():
            return True
        time.sleep(POLL)
    return False


def _unlogged(home: StudyFolder, folder: Path | None) -> str:
    program, metric = home.sweep.program, home.sweep.metric
    if folder is None:
        return (
            f"metric.name {metric} cannot be found: {program} wrote no run folder's path into the file "
            "$TESSERA_RECORD; let it do so, as docs/sweeps.md describes"
        )
    names = columns(folder)
    near = nearest(metric, names) if len(names) <= 20 else f"{folder / 'metrics.csv'} names the columns"
    return f"metric.name {metric} is never logged by {program}; {near if names else 'it logs nothing'}"


def run_folder(record: Path) -> Path | None:
    """The folder of a trial's run, once the trial has said which it is."""
    text = record.read_text().strip() if record.exists() else ""
    return Path(text) if text else None


def logged(folder: Path, metric: str) -> list[float]:
    """The values of a metric so far, from the whole lines of metrics.csv."""
    path = folder / "metrics.csv"
    text = path.read_text() if path.exists() else ""
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [float(row[metric]) for row in rows if row.get(metric)]


def _results(folder: Path) -> dict[str, float]:
    path = folder / "results.json"
    return json.loads(path.read_text()).get("metrics", {}) if path.exists() else {}


def final(folder: Path, metric: str) -> float | None:
    """The value in results.json, else the last one logged; None where the metric is in neither."""
    results = _results(folder)
    values = [float(results[metric])] if metric in results else logged(folder, metric)
    return values[-1] if values else None


def columns(folder: Path) -> list[str]:
    """All metrics of a run."""
    path = folder / "metrics.csv"
    names = csv.DictReader(path.open(newline="")).fieldnames if path.exists() else []
    return [name for name in dict.fromkeys([*names, *_results(folder)]) if name != "step"]


def tail(log: Path) -> str:
    """The last lines of a log."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
