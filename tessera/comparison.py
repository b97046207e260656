"""Runs beside each other: a table and a figure, with what differs between their words as labels and seeds as a band."""

import csv
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tessera.folder import RunFolder
from tessera.report import save_figure

Curve = dict[int, float]  # value by step
ABSCISSAE = {"round": "rounds", "horizon": "horizon T", "samples": "samples n"}
FEW_POINTS = 12  # up to which each is marked


def compare(runs: Sequence[RunFolder], picture: Path) -> None:
    """Print a table of finished runs, the best first, and draw their headline metric against the work done.

    Raises ValueError where a run has not ended or was never evaluated, or there is nothing to compare: fewer than two,
    or other metrics.
    """
    for run in runs:
        if not run.results:
            raise ValueError(f"{run.path} has no results.json: it is no run folder, or its run has not ended")
        if run.results["headline"]["value"] is None:
            raise ValueError(f"{run.path} has no {run.results['headline']['metric']}: run it with stages=[fit,test]")
    headlines = {run.results["headline"]["metric"] for run in runs}
    if len(runs) < 2 or len(headlines) > 1:
        raise ValueError(
            f"{len(runs)} runs with {' and '.join(sorted(headlines))}: a comparison needs two or more runs with the "
            "same headline metric"
        )
    groups = grouped(runs)
    Console(width=None if Console().is_terminal else 160).print(table(groups))
    save_figure(figure(groups), picture)
    print(f"the curves are in {picture}")


def grouped(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Runs by the words in which they differ, those that differ in the seed alone together, the best group first."""
    words = [[w for w in run.record["words"] if not w.startswith("seed=")] for run in runs]
    common = set(words[0]).intersection(*words)
    groups: dict[str, list[RunFolder]] = {}
    for run, own in zip(runs, words):
        label = " ".join(word for word in own if word not in common) or run.results["model"]
        groups.setdefault(label, []).append(run)
    sign = -1 if runs[0].results["headline"]["direction"] == "max" else 1
    return dict(sorted(groups.items(), key=lambda item: sign * statistics.fmean(values(item[1]))))


def values(runs: Sequence[RunFolder]) -> list[float]:
    """The headline of each run."""
    return [run.results["headline"]["value"] for run in runs]


def table(groups: dict[str, list[RunFolder]]) -> Table:
    """A row for each group: mean and deviation over seeds, each seed, seconds, and the cells that its seeds share."""
    first = next(iter(groups.values()))[0].results
    cells = {label: shared([run.results.get("table", {}) for run in runs]) for label, runs in groups.items()}
    headline = first["headline"]["metric"].rpartition("/")[2]
    others = [name for name in dict.fromkeys(name for row in cells.values() for name in row) if name != headline]
    made = Table(title=f"{first['model']} on {first['data']['name']}: {first['headline']['metric']}")
    for name in ("", "mean", "sd", "by seed", "seconds", *others):
        made.add_column(name, no_wrap=True)
    for label, runs in groups.items():
        found = values(runs)
        spread = f"{statistics.stdev(found):.4f}" if len(found) > 1 else ""
        by_seed = "  ".join(f"{run.results['seed']}: {value:.4f}" for run, value in zip(runs, found))
        seconds = statistics.fmean(run.results["seconds"] for run in runs)
        rest = [cells[label].get(name, "") for name in others]
        made.add_row(label, f"{statistics.fmean(found):.4f}", spread, by_seed, f"{seconds:.0f}", *rest)
    return made


def shared(tables: Sequence[dict[str, str]]) -> dict[str, str]:
    """The cells in which all tables agree: of several seeds, what a choice costs."""
    return {name: cell for name, cell in tables[0].items() if all(table.get(name) == cell for table in tables)}


def figure(groups: dict[str, list[RunFolder]]) -> Figure:
    """The headline metric while training, the mean over seeds as a line and their range as a band."""
    first = next(iter(groups.values()))[0].results
    metric = re.sub("^test", "val", first["headline"]["metric"])
    work = {run.results["units_per_step"] for runs in groups.values() for run in runs}
    unit, scale = ("tokens", work.pop()) if len(work) == 1 and None not in work else ("step", 1)
    made, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, runs in groups.items():
        curves = [curve(run.path / "metrics.csv", metric) for run in runs]
        steps = sorted(set(curves[0]).intersection(*curves))
        rows = [[one[step] for one in curves] for step in steps]
        done = [scale * (step + 1) for step in steps]
        (line,) = axis.plot(done, [statistics.fmean(row) for row in rows], label=f"{label} (n={len(runs)})")
        axis.fill_between(done, [min(r) for r in rows], [max(r) for r in rows], color=line.get_color(), alpha=0.2)
    axis.set(xlabel=unit, ylabel=metric, title=f"{first['model']}: mean and range over seeds")
    axis.legend(fontsize=8)
    return made


def curve(path: Path, metric: str) -> Curve:
    """The values of a metric by step; of a step that was logged twice the last."""
    with path.open(newline="") as file:
        return {int(row["step"]): float(row[metric]) for row in csv.DictReader(file) if row.get(metric)}


def beside(runs: dict[str, RunFolder], picture: Path) -> None:
    """Draw what simulations measured (`export/curves.csv`) over one another, where at least two left that.

    The first column is the abscissa. Drawn is what stands in the tables of all runs by round or point (`name@...`),
    with the slopes that were fitted to it, and the band between `<name>_low` and `<name>_high` where there is one.
    Labels that differ in a last `seed <number>` are a mean with a band.
    """
    curves = {label: run.path / "export" / "curves.csv" for label, run in runs.items()}
    columns = {label: _columns(path) for label, path in curves.items() if path.exists()}
    names = [_shown(columns[label], runs[label]) for label in columns]
    shared_names = [name for name in names[0] if all(name in own for own in names)] if names else []
    abscissae = {next(iter(own)) for own in columns.values()}
    if len(columns) < 2 or not shared_names or len(abscissae) > 1:
        return
    abscissa = abscissae.pop()
    size = (5 * len(shared_names), 4)
    made, axes = plt.subplots(1, len(shared_names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], shared_names):
        for line, labels in _by_seed(columns).items():
            fitted = _slope(runs[line].results["table"], name, len(shared_names) == 1) if line in runs else None
            slope = "" if fitted is None else f", slope {fitted.split()[0]}"
            _draw(axis, abscissa, name, [columns[label] for label in labels], line + slope)
        points = next(iter(columns.values()))[abscissa]
        _scale(axis, points, [value for own in columns.values() for value in own[name]])
        axis.set(xlabel=ABSCISSAE.get(abscissa, abscissa), title=name)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25)
    save_figure(made, picture)


def _by_seed(columns: dict[str, dict[str, list[float]]]) -> dict[str, list[str]]:
    """The labels of each line: one, or those that differ in their last `seed <number>` and were measured alike."""
    groups: dict[tuple[str, int], list[str]] = {}
    for label, own in columns.items():
        groups.setdefault((re.sub(r",? *seed \d+$", "", label), len(next(iter(own.values())))), []).append(label)
    return {
        labels[0] if len(labels) == 1 else f"{name or 'mean'}, {len(labels)} seeds": labels
        for (name, _), labels in groups.items()
    }


def _draw(axis: plt.Axes, abscissa: str, name: str, runs: list[dict[str, list[float]]], label: str) -> None:
    """The mean of the runs and their range as a band, or of one run the interval that it left."""
    x, points = runs[0][abscissa], list(zip(*(own[name] for own in runs)))
    marker = "o" if len(x) <= FEW_POINTS else None
    (line,) = axis.plot(x, [statistics.fmean(point) for point in points], marker=marker, markersize=3, label=label)
    if len(runs) > 1:
        axis.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=line.get_color(), alpha=0.2)
    elif f"{name}_low" in runs[0]:
        low, high = runs[0][f"{name}_low"], runs[0][f"{name}_high"]
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)


def _scale(axis: plt.Axes, x: list[float], y: list[float]) -> None:
    """Logarithmic axes for what spans decades, or few points that do; a tick at each of few points."""
    positive, few = [value for value in y if value > 0], len(x) <= FEW_POINTS
    wide = few and len(positive) == len(y) and max(x) >= 5 * min(x) > 0
    if positive and (wide or max(positive) > 100 * min(positive)):
        axis.set(xscale="log", yscale="log", ylim=(None if wide else max(min(positive), 1e-12), None))
    if few:
        axis.set_xticks(x, [f"{point:g}" for point in x])
        axis.xaxis.minorticks_off()


def _slope(table: dict[str, str], name: str, alone: bool) -> str | None:
    """The slope fitted to a measurement; the one that has no name belongs to what is drawn `alone`."""
    return table.get(f"{name}_slope", table.get("slope") if alone else None)


def _shown(columns: dict[str, list[float]], run: RunFolder) -> list[str]:
    """The measurements that stand in the table of a run by round; all where none does."""
    table = run.results.get("table", {})
    found = [name for name in list(columns)[1:] if any(cell.startswith(f"{name}@") for cell in table)]
    return found or [name for name in list(columns)[1:] if not name.endswith(("_low", "_high"))]


def _columns(path: Path) -> dict[str, list[float]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return {name: [float(row[place]) for row in rows] for place, name in enumerate(header)}
