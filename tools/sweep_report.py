"""What a study found: a table, the history and the importance of the parameters as figures, the best command."""

import math
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import optuna
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from tools.sweep_study import StudyFolder

ROWS = 10
ENOUGH = 4  # finished trials from which an importance can be told


def report(home: StudyFolder) -> None:
    """Print the best trials and write history.png, importance.png and best.yaml beside them."""
    console = Console(width=None if Console().is_terminal else 160)
    trials = ranked(home)
    if trials:
        console.print(_table(home, trials))
    console.print(counts(home), highlight=False)
    if not trials:
        return
    best = home.folder / "best.yaml"
    best.write_text(yaml.safe_dump(summary(home, trials[0]), sort_keys=False, width=10_000))
    history(home).savefig(home.folder / "history.png", dpi=120)
    weights = importance(home)
    if weights:
        bars(weights, home.sweep.metric).savefig(home.folder / "importance.png", dpi=120)
    else:
        console.print(f"importance.png needs {ENOUGH} finished trials and two values of a parameter", highlight=False)
    console.print(f"figures and best.yaml are in {home.folder}", highlight=False, soft_wrap=True)


def ranked(home: StudyFolder) -> list[FrozenTrial]:
    """The trials that were carried out to the end, the best first."""
    done = [trial for trial in home.trials if trial.state == TrialState.COMPLETE]
    return sorted(done, key=lambda trial: trial.value, reverse=home.sweep.maximize)


def counts(home: StudyFolder) -> str:
    """How many trials are in which state."""
    states = Counter(trial.state.name.lower() for trial in home.trials)
    return ", ".join(f"{number} {state}" for state, number in states.items()) or "no trials yet"


def spoken(arguments: dict[str, Any]) -> str:
    """Parameters in one line; of numbers, what one can compare by eye."""
    short = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in arguments.items()}
    return "  ".join(f"{name}={value}" for name, value in short.items())


def _table(home: StudyFolder, trials: list[FrozenTrial]) -> Table:
    goal = "most" if home.sweep.maximize else "least"
    table = Table(title=f"{home.sweep.name}: {goal} {home.sweep.metric}")
    for name in ("trial", home.sweep.metric, "parameters", "run"):
        table.add_column(name, overflow="fold")
    for trial in trials[:ROWS]:
        parameters = spoken(trial.user_attrs["arguments"])
        table.add_row(str(trial.number), f"{trial.value:.6g}", parameters, _near(trial.user_attrs.get("run")))
    return table


def _near(run: str | None) -> str:
    path = Path(run or "")
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def summary(home: StudyFolder, trial: FrozenTrial) -> dict[str, Any]:
    """best.yaml: what the best trial is, and the command that repeats it."""
    return {
        "trial": trial.number,
        home.sweep.metric: trial.value,
        "parameters": trial.user_attrs["arguments"],
        "command": trial.user_attrs["command"].removeprefix("/usr/bin/env "),
        "run": trial.user_attrs.get("run"),
    }


def history(home: StudyFolder) -> Figure:
    """The value of every trial, and the best so far."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for state, marker in ((TrialState.COMPLETE, "o"), (TrialState.PRUNED, "x")):
        shown = [(t.number, t.value) for t in home.trials if t.state == state and t.value is not None]
        if shown:
            axis.scatter(*zip(*shown), marker=marker, s=18, label=state.name.lower())
    done = sorted(ranked(home), key=lambda trial: trial.number)
    best = accumulate((trial.value for trial in done), max if home.sweep.maximize else min)
    axis.step([trial.number for trial in done], list(best), where="post", color="tab:red", label="best so far")
    axis.set(xlabel="trial", ylabel=home.sweep.metric)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)
    return figure


def importance(home: StudyFolder) -> dict[str, float]:
    """Each parameter's share in what makes the best trials differ from the others (PED-ANOVA, arXiv 2304.10255)."""
    if len(ranked(home)) < ENOUGH or not home.sweep.axes:
        return {}
    evaluator = PedAnovaImportanceEvaluator()
    weights = optuna.importance.get_param_importances(home.study, evaluator=evaluator)
    return weights if all(math.isfinite(weight) for weight in weights.values()) else {}


def bars(weights: dict[str, float], metric: str) -> Figure:
    """The importances, the greatest on top."""
    figure = Figure(figsize=(6, 1 + 0.4 * len(weights)), layout="constrained")
    axis = figure.subplots()
    names = list(reversed(weights))
    axis.barh(names, [weights[name] for name in names])
    axis.set(xlabel=f"importance for {metric}")
    return figure
