"""Pictures of a judge: its embeddings, its table of scores beside the true one, its calibration."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.alignment.judges import EmbeddingJudge, Judge
from lightning_modules.alignment.pair_accuracy import bins, measure

SHOWN = 4  # tournaments, the first of each kind


def first_of_each_kind(tournaments: list) -> list:
    """At most `SHOWN` tournaments of different kinds."""
    kinds: dict[str, object] = {}
    for tournament in tournaments:
        kinds.setdefault(tournament.kind, tournament)
    return list(kinds.values())[:SHOWN]


@torch.no_grad()
def circles(judge: EmbeddingJudge, tournaments: list) -> Figure:
    """Where the answers to a prompt lie in each plane: one beats those up to half a turn ahead, counter-clockwise."""
    shown = first_of_each_kind(tournaments)
    embedded = [judge.represent(t.prompt_ids, t.answers) for t in shown]
    planes = embedded[0].vectors.shape[-1] // 2
    figure, axes = plt.subplots(
        planes, len(shown), figsize=(3.2 * len(shown), 3.2 * planes), squeeze=False, layout="constrained"
    )
    for column, (tournament, (vectors, scale)) in enumerate(zip(shown, embedded)):
        points = vectors[0].unflatten(1, (-1, 2)).cpu()
        reach = 1.15 * max(1.0, float(points.abs().max()))
        for plane in range(planes):
            axis, weight = axes[plane, column], 1.0 if scale is None else float(scale[0, plane])
            axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="lightgray"))
            axis.scatter(*points[:, plane].T, s=12)
            for name, point in zip(tournament.names, points[:, plane]):
                axis.annotate(name, point.tolist(), fontsize=7)
            axis.set(aspect="equal", xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach))
            axis.set_title(f"{tournament.kind}, plane {plane + 1}: lambda {weight:.2f}", fontsize=8, loc="left")
    return figure


@torch.no_grad()
def tables(judge: Judge, tournaments: list) -> Figure:
    """The log-odds of every answer against every other one, true and judged."""
    shown = first_of_each_kind(tournaments)
    figure, axes = plt.subplots(2, len(shown), figsize=(3 * len(shown), 5.6), squeeze=False, layout="constrained")
    for column, tournament in enumerate(shown):
        judged = judge.matrix(tournament.prompt_ids, tournament.answers).float().cpu()
        for axis, name, table in zip(axes[:, column], ("true", "judged"), (tournament.log_odds, judged)):
            image = axis.imshow(torch.sigmoid(table), cmap="PuOr", vmin=0, vmax=1)
            axis.set_title(f"{tournament.kind}: {name}", fontsize=8, loc="left")
            axis.set_xticks(range(len(table)), tournament.names, fontsize=6)
            axis.set_yticks(range(len(table)), tournament.names, fontsize=6)
    figure.colorbar(image, ax=axes, label="P(row beats column)", shrink=0.7)
    return figure


def reliability(held_out: dict[str, tuple[Tensor, Tensor]], ceilings: dict[str, float]) -> Figure:
    """Accuracy of every subset, beside what a scalar can reach where that is known, and calibration over all pairs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    accuracies = {name: measure(*columns)["pair_accuracy"] for name, columns in held_out.items()}
    left.bar(accuracies.keys(), [100 * value for value in accuracies.values()])
    for place, name in enumerate(accuracies):
        if name in ceilings:
            left.hlines(100 * ceilings[name], place - 0.4, place + 0.4, color="black", linestyle="--", linewidth=1)
    left.axhline(50, color="gray", linestyle=":")
    left.set(ylabel="right pairs (per cent)", title="dashes: the best scalar" if ceilings else "", ylim=(0, 100))
    left.tick_params(axis="x", rotation=30 if len(accuracies) > 5 else 0)
    log_odds, label = (torch.cat(column) for column in zip(*held_out.values()))
    log_odds, label = torch.cat([log_odds, -log_odds]), torch.cat([label, 1 - label])  # in both orders
    groups = bins(torch.sigmoid(log_odds), label)
    right.plot([0, 1], [0, 1], color="gray", linestyle=":")
    right.scatter([g[1] for g in groups], [g[2] for g in groups], s=[20 + 200 * g[0] / len(label) for g in groups])
    right.set(xlabel="predicted P(first is better)", ylabel="mean label", xlim=(0, 1), ylim=(0, 1))
    return figure
