"""The agents of one command: started, shown on the screen, stopped."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.sweep_agent import work
from tools.sweep_report import ranked, spoken
from tools.sweep_study import StudyFolder

POLL = 0.1  # seconds
INTERRUPTED = "interrupted: the same command goes on with the trials that are under way and those that are left"


class Told(BaseException):
    """SIGTERM or Ctrl-C."""


@contextmanager
def told_by_signals() -> Iterator[None]:
    """Raise Told for the first SIGTERM or SIGINT; further ones wait with us for the agents."""

    def tell(number: int, frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Told(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Agents:
    """The agents of one command, and what they have brought about on the screen."""

    def __init__(self, home: StudyFolder, number: int) -> None:
        self.home = home
        fork = multiprocessing.get_context("fork")  # Optuna is imported once
        arguments = (home.sweep, home.folder, home.limit, home.began)
        self.processes: list[ForkProcess] = [fork.Process(target=work, args=arguments) for _ in range(number)]
        self.shown = {trial.number for trial in home.trials if trial.state.is_finished()}
        self.missed: set[int] = set()

    def watch(self) -> int:
        """Start the agents and show what they do until the last one has ended; the exit status."""
        if self.shown:
            print(f"going on in {self.home.folder}: {len(self.shown)} trials are done", flush=True)
        with told_by_signals():
            try:
                for process in self.processes:
                    process.start()
                self._show()
            except Told as told:
                return self._stop(told.args[0])
        return self._verdict()

    def _show(self) -> None:
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(self.home.sweep.name, total=self.home.limit)
            alive = True
            while alive:
                alive = any(process.is_alive() for process in self.processes)
                for line in self._news():
                    progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                    sys.stdout.flush()
                progress.update(bar, completed=len(self.shown), description=self._headline())
                time.sleep(POLL if alive else 0)

    def _headline(self) -> str:
        best = ranked(self.home)[:1]
        return f"{self.home.sweep.name}  best {best[0].value:.6g}" if best else self.home.sweep.name

    def _news(self) -> Iterator[str]:
        """A line for every trial that has ended since, by whichever agent, and for an agent that was killed."""
        for trial in self.home.trials:
            if trial.state.is_finished() and trial.number not in self.shown:
                self.shown.add(trial.number)
                yield self._line(trial)
        for process in self.processes:
            if process.exitcode and process.pid not in self.missed:
                self.missed.add(process.pid)
                yield f"agent {process.pid} ended with status {process.exitcode}; another one carries its trial on"

    def _line(self, trial: FrozenTrial) -> str:
        state = trial.state.name.lower()
        if state == "fail":
            log = self.home.place(trial.number, "log")
            return f"trial {trial.number} failed  {trial.user_attrs.get('failure')}  ({log})"
        value = f"value {trial.value:.6g}  " if trial.value is not None else ""
        so_far = [trial for trial in ranked(self.home) if trial.number in self.shown]
        best = [f"best {best.value:.6g} (trial {best.number})  " for best in so_far[:1]]
        word = "finished" if state == "complete" else state
        return f"trial {trial.number} {word}  {value}{''.join(best)}{spoken(trial.user_attrs['arguments'])}"

    def _stop(self, number: int) -> int:
        """Have the agents end their trials' processes; the trials stay under way."""
        print("stopping: waiting for the trials to end", file=sys.stderr, flush=True)
        for process in self.processes:
            if process.is_alive():
                process.terminate()
        for process in self.processes:
            if process.pid:
                process.join()
        print(INTERRUPTED, file=sys.stderr, flush=True)
        return 128 + number

    def _verdict(self) -> int:
        reason = self.home.hopeless()
        if reason:
            print(f"error: {self.home.sweep.path}: {reason}", file=sys.stderr)
            return 1
        if self.missed and all(process.exitcode for process in self.processes):
            print("error: every agent ended before the sweep did; the same command goes on", file=sys.stderr)
            return 1
        return 0
