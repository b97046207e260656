"""Pictures of what a value function learned."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datamodules.batches import Trajectory

PAIRS = 100  # problems with a correct and an incorrect answer that are looked at
COLORS = {True: "tab:green", False: "tab:red"}


def contrasting(trajectories: list[Trajectory]) -> list[tuple[Trajectory, ...]]:
    """(correct, incorrect) answers to one problem, of the first problems that have both; else one answer of a kind."""
    right, wrong = {}, {}
    for trajectory in trajectories:
        (right if trajectory.reward > 0 else wrong).setdefault(trajectory.prompt_id, trajectory)
    pairs = [(right[problem], wrong[problem]) for problem in right if problem in wrong]
    return pairs[:PAIRS] or [tuple([*list(right.values())[:1], *list(wrong.values())[:1]])]


def parting(a: Trajectory, b: Trajectory) -> int:
    """The number of response tokens that two trajectories have in common before they part."""
    pairs = zip(a.response_ids, b.response_ids)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.response_ids), len(b.response_ids)))


def value_along_solutions(method, trajectories: list[Trajectory]) -> Figure:
    """V of every state along correct and incorrect solutions: on average, and token by token for one problem.

    The problem shown is the one, of a hundred, whose two solutions end at the values farthest apart.
    """
    chosen = contrasting(trajectories)
    values = _values(method, [trajectory for pair in chosen for trajectory in pair])
    groups = [values[i : i + len(chosen[0])] for i in range(0, len(values), len(chosen[0]))]
    shown = max(range(len(groups)), key=lambda i: groups[i][0][-1] - groups[i][-1][-1])
    rows = 1 + len(chosen[shown])
    figure, axes = plt.subplots(rows, 1, figsize=(11, 2.6 * rows), sharey=True, layout="constrained")
    _average(axes[0], chosen, groups)
    for axis, trajectory, along in zip(axes[1:], chosen[shown], groups[shown]):
        tokens = [method.policy.tokenizer.decode([token]) for token in trajectory.response_ids]
        _solution(axis, along, tokens, trajectory)
    if len(chosen[shown]) == 2:
        axes[-1].axvline(parting(*chosen[shown]), color="gray", linewidth=0.8)
    return figure


@torch.no_grad()
def _values(method, trajectories: list[Trajectory]) -> list[list[float]]:
    width = max(len(t.prompt_ids) + len(t.response_ids) for t in trajectories)
    ids = torch.zeros(len(trajectories), width, dtype=torch.long)
    mask = torch.zeros(len(trajectories), width - 1, dtype=torch.bool)
    for row, t in enumerate(trajectories):
        ids[row, : len(t.prompt_ids) + len(t.response_ids)] = torch.tensor(t.prompt_ids + t.response_ids)
        mask[row, len(t.prompt_ids) - 1 : len(t.prompt_ids) + len(t.response_ids) - 1] = True
    found = []
    for some_ids, some_mask in zip(ids.to(method.device).split(16), mask.to(method.device).split(16)):
        values = method.values({"ids": some_ids, "mask": some_mask}, method.policy(some_ids, some_mask))
        found += [row[marked].tolist() for row, marked in zip(values.float(), some_mask)]
    return found


def _average(axis: Axes, chosen: list[tuple[Trajectory, ...]], groups: list[list[list[float]]]) -> None:
    grid = np.linspace(0, 1, 21)
    for right in (True, False):
        curves = [
            np.interp(grid, np.linspace(0, 1, len(along)), along)
            for pair, lines in zip(chosen, groups)
            for trajectory, along in zip(pair, lines)
            if (trajectory.reward > 0) == right
        ]
        if curves:
            mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0)
            axis.plot(grid, mean, color=COLORS[right], label=f"{len(curves)} {'correct' if right else 'incorrect'}")
            axis.fill_between(grid, mean - spread, mean + spread, color=COLORS[right], alpha=0.15)
    axis.set(xlabel="position in the solution", ylabel="V(state)")
    axis.set_title("solutions of the same problems: mean and standard deviation", fontsize=9, loc="left")
    axis.legend(fontsize=7)


def _solution(axis: Axes, values: list[float], tokens: list[str], trajectory: Trajectory) -> None:
    right = trajectory.reward > 0
    axis.plot(values, marker=".", color=COLORS[right])
    axis.axhline(trajectory.reward, linestyle=":", color="gray")
    labels = [repr(token.strip(" "))[1:-1] or "·" for token in tokens]  # control characters have no glyph
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6 if len(labels) < 120 else 3)
    axis.set_ylabel("V(state)")
    question = " ".join(trajectory.question.split())[:140]
    title = f"correct: {question}" if right else f"incorrect, the gold answer is {trajectory.gold}"
    axis.set_title(title, fontsize=9, loc="left")


def reward_histogram(trajectories: list[Trajectory]) -> Figure:
    """How often the sampled answers to a problem are right: what there is to learn from."""
    by_prompt: dict[str, list[float]] = {}
    for trajectory in trajectories:
        by_prompt.setdefault(trajectory.prompt_id, []).append(trajectory.reward)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.hist([t.reward for t in trajectories], bins=20)
    left.set(xlabel="reward of a sampled answer", ylabel="answers")
    right.hist([sum(rewards) / len(rewards) for rewards in by_prompt.values()], bins=17)
    right.set(xlabel="mean reward of a problem's answers", ylabel="problems")
    return figure
