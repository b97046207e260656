"""Carry out a W&B sweep file without W&B, by one or more agents that share a study on the disk.

python -m tools.sweep conf/sweep/dqo.yaml --agents 2 --trials 50
python -m tools.sweep conf/sweep/dqo.yaml --report            what it found: table, figures, the best command

The same command goes on with a sweep that was interrupted; given elsewhere for the same folder, it joins. The file also
works with `wandb sweep` and `wandb agent`. docs/sweeps.md says more.
"""

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.sweep_format import Sweep, read

POLL = 0.1  # seconds
INTERRUPTED = "interrupted: the same command goes on with the trials that are under way and those that are left"


def main() -> int:
    """The command line; 0 when the sweep is complete, 1 with a sentence, 130 and 143 after Ctrl-C and SIGTERM."""
    options = _options()
    try:
        if options.agents < 1 or (options.trials is not None and options.trials < 1):
            raise ValueError("--agents and --trials are numbers from 1 on")
        sweep = read(options.file)
        return _carried_out(sweep, options)
    except ImportError as error:
        if error.name != "optuna":
            raise
        print("error: sweeps need Optuna: pip install 'tessera[sweep]'", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a sweep file in W&B's format")
    parser.add_argument("--agents", type=int, default=1, help="trials at the same time (1)")
    parser.add_argument("--trials", type=int, help="trials of the study, over all agents and commands")
    parser.add_argument("--folder", type=Path, help="of the study (outputs/sweeps/<name>-<hash of the file>)")
    parser.add_argument("--report", action="store_true", help="only show what was found so far")
    return parser.parse_args()


def _carried_out(sweep: Sweep, options: argparse.Namespace) -> int:
    from tools.sweep_report import report  # Optuna comes in only here
    from tools.sweep_study import StudyFolder

    folder = options.folder or Path("outputs/sweeps", f"{sweep.name}-{sweep.digest[:8]}")
    if options.report and not (folder / "journal.log").exists():
        raise ValueError(f"{sweep.path}: {folder} has no study yet; leave out --report, or give its --folder")
    limit = None if options.report else _limit(sweep, options.trials)
    home = StudyFolder(sweep, folder, limit, datetime.now())
    status = 0 if options.report else Agents(home, options.agents).watch()
    if status == 0:
        report(home)
    return status


def _limit(sweep: Sweep, trials: int | None) -> int:
    bounds = [bound for bound in (trials, sweep.run_cap, sweep.grid_size) if bound is not None]
    if not bounds:
        raise ValueError(f"{sweep.path}: run_cap is missing, and {sweep.method} never ends by itself; give --trials 50")
    return min(bounds)


class Told(BaseException):
    """SIGTERM or Ctrl-C."""


@contextmanager
def told_by_signals() -> Iterator[None]:
    """Raise Told for SIGTERM and SIGINT."""

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

    def __init__(self, home: Any, number: int) -> None:
        from tools.sweep_agent import work

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
        try:
            with told_by_signals():
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
        from tools.sweep_report import ranked

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

    def _line(self, trial: Any) -> str:
        from tools.sweep_report import ranked, spoken

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
            print("error: every agent was killed before the end; the same command goes on", file=sys.stderr)
            return 1
        return 0


if __name__ == "__main__":
    sys.exit(main())
