"""What a run leaves for people: results.json, a table, learning curves, a model card."""

import csv
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tessera.checkpoints import write_text
from tessera.folder import RunFolder

LIBRARIES = ("torch", "lightning", "transformers", "numpy")


class Figures(Callback):
    """Save the method's figures after every validation and test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "figures"

    def on_validation_end(self, trainer, pl_module) -> None:
        self._save(trainer, pl_module)

    def on_test_end(self, trainer, pl_module) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer, method) -> None:
        figures = method.figures()  # on every process: a sharded network answers only when all ask
        if trainer.is_global_zero:
            for name, figure in figures.items():
                save_figure(figure, self.folder / f"{name}.png")
        plt.close("all")


def save_figure(figure: Figure, path: Path) -> None:
    """A PNG that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=120, format="png")
    beside.replace(path)


def git_commit() -> str | None:
    """The commit of this checkout, marked when files differ from it; None outside of git."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Python and the libraries that numbers depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def write_results(folder: RunFolder, plan: Any, method: Any, metrics: dict[str, float], seconds: float) -> None:
    """results.json: the last thing a run writes, so that its presence says that the run has ended."""
    name, direction = method.headline
    tested = method.metric(name.replace("val/", "test/"))
    value = metrics.get(tested, metrics.get(method.metric(name)))
    results = {
        "model": plan.name,
        "data": {"name": plan.data.name, "standin": method.standin, "source": plan.data.source.origin},
        "headline": {"metric": tested, "direction": direction, "value": value},
        "metrics": metrics,
        "units_per_step": getattr(plan.data, "tokens_per_step", None),
        "table": cells(metrics, method.columns),
        "caption": method.caption,
        "leaves": method.leaves,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "seed": plan.config.seed,
        "started_from": str(plan.start.path) if plan.start else plan.config.policy_weights,
        "command": command(plan.words),
        "commit": git_commit(),
        "versions": versions(),
    }
    curves = learning_curves(folder.path / "metrics.csv")
    if curves is not None:
        save_figure(curves, folder.path / "figures" / "learning_curves.png")
        plt.close(curves)
    write_text(folder.path / "results.json", json.dumps(results, indent=1))
    write_card(folder, {results["model"].upper(): folder})


def command(words: list[str]) -> str:
    """What to type to repeat a run."""
    return shlex.join(["python", "train.py", *words])


PANELS = {
    "loss": r"loss$",
    "held-out": r"(greedy|auc|pair_accuracy|win_rate|beats_data)$",
    "log-probability of a response": r"logps/",
    "reward": r"rewards/(chosen|rejected)$",
    "sum of log ratios": r"log_ratio",
    "value and reward": r"(value_start|/reward)$",
    "gradient norm": r"grad_norm",
}


def learning_curves(path: Path) -> Figure | None:
    """The logged metrics that are worth a look, against the step; None where nothing was logged."""
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    logged = {name for row in rows for name, value in row.items() if value}
    names = [name for name in (rows[0] if rows else {}) if name in logged and not name.startswith("test")]
    groups = {title: [name for name in names if re.search(pattern, name)] for title, pattern in PANELS.items()}
    groups = {title: members for title, members in groups.items() if members}
    if not groups:
        return None
    figure, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3), squeeze=False, layout="constrained")
    for axis, (title, members) in zip(axes[0], groups.items()):
        for name in members:
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
    return figure


def finish(folder: RunFolder, rows: dict[str, RunFolder]) -> None:
    """Print the table of a run beside those it is compared with, and write it into the card."""
    write_card(folder, rows)
    console = Console(width=None if Console().is_terminal else 160)
    if any(run.results["table"] for run in rows.values()):
        console.print(_rich_table(rows))
        for note in _notes(rows):
            console.print(note)
    console.print(f"figures, samples and the model card are in {folder.path}")


def cells(metrics: dict[str, float], columns: dict[str, Callable[[float], str]]) -> dict[str, str]:
    """Test metrics as they stand in a table, by short name in the order of `columns`, with their intervals."""
    tested = {re.sub(r"^test[^/]*/", "", n): v for n, v in metrics.items() if n.startswith("test")}
    found = {}
    for start, written in columns.items():
        for name, value in tested.items():
            if name.startswith(start) and not name.endswith(("_low", "_high")):
                low, high = tested.get(f"{name}_low"), tested.get(f"{name}_high")
                interval = f" [{written(low)}, {written(high)}]" if low is not None else ""
                found.setdefault(name, written(value) + interval)
    return found


def _table(rows: dict[str, RunFolder]) -> tuple[list[str], list[list[str]]]:
    cells = {label: run.results["table"] for label, run in rows.items()}
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    body = [
        [label, *(cells[label].get(name, "") for name in names), f"{run.results['seconds']:.0f}"]
        for label, run in rows.items()
    ]
    return ["", *names, "seconds"], body


def _rich_table(rows: dict[str, RunFolder]) -> Table:
    header, body = _table(rows)
    results = next(reversed(rows.values())).results
    table = Table(title=f"{results['data']['name']}: {results['caption']}")
    for name in header:
        table.add_column(name, no_wrap=True)
    for line in body:
        table.add_row(*line)
    return table


def _notes(rows: dict[str, RunFolder]) -> list[str]:
    results = [run.results for run in rows.values()]
    notes = []
    if any(r["data"]["standin"] for r in results):
        notes.append("The data is a stand-in: the numbers say nothing about the real data set.")
    if {"dqo", "rft"} <= {r["model"] for r in results}:
        notes.append(
            "At this scale RFT and DRO are as good as DQO or better; docs/main-job.md says what may be concluded."
        )
    return notes


def write_card(folder: RunFolder, rows: dict[str, RunFolder]) -> None:
    """README.md of the run folder."""
    results = folder.results
    header, body = _table(rows)
    lines = [" | ".join(["", *line, ""]).strip() for line in (header, ["---"] * len(header), *body)]
    figures = sorted((folder.path / "figures").glob("*.png"))
    start = f", starting from `{results['started_from']}`" if results["started_from"] else ""
    text = [
        f"# {results['model']} on {results['data']['name']}",
        "",
        f"{results['parameters']:,} trained parameters, seed {results['seed']}, "
        f"data from {results['data']['source']}{start}.",
        "",
        *lines,
        "",
        f"{results['caption'][0].upper()}{results['caption'][1:]}.",
        *_notes(rows),
        "",
        *(f"![{figure.stem}](figures/{figure.name})" for figure in figures),
        "",
        f"Repeat it with `{results['command']}` at commit {results['commit']}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in results['versions'].items())}.",
        *([results["leaves"], ""] if results["leaves"] else []),
    ]
    write_text(folder.path / "README.md", "\n".join(text))
