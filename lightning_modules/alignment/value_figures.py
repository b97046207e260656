"""Pictures of what a value function learned."""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datamodules.batches import Trajectory


def contrasting(trajectories: list[Trajectory]) -> list[Trajectory]:
    """A correct and an incorrect response to one problem, or the first of each kind."""
    right = {t.prompt_id: t for t in trajectories if t.reward > 0}
    pair = next(([right[t.prompt_id], t] for t in trajectories if t.reward <= 0 and t.prompt_id in right), None)
    if pair:
        return pair
    wrong = next((t for t in trajectories if t.reward <= 0), None)
    return [t for t in (next(iter(right.values()), None), wrong) if t is not None]


@torch.no_grad()
def value_along_solutions(method, trajectories: list[Trajectory]) -> Figure:
    """V of every state along a correct and an incorrect solution of the same problem, token by token."""
    chosen = contrasting(trajectories)
    figure, axes = plt.subplots(len(chosen), 1, figsize=(11, 3.2 * len(chosen)), squeeze=False, layout="constrained")
    for axis, trajectory in zip(axes[:, 0], chosen):
        ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids], device=method.device)
        mask = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool, device=method.device)
        mask[:, len(trajectory.prompt_ids) - 1 :] = True
        batch = {"ids": ids, "mask": mask}
        values = method.values(batch, method.policy(ids, mask))[mask].tolist()
        tokens = [method.policy.tokenizer.decode([token]) for token in trajectory.response_ids]
        _solution(axis, values, tokens, trajectory)
    figure.suptitle(chosen[0].question.strip()[:160], fontsize=9, wrap=True)
    return figure


def _solution(axis: Axes, values: list[float], tokens: list[str], trajectory: Trajectory) -> None:
    right = trajectory.reward > 0
    axis.plot(values, marker=".", color="tab:green" if right else "tab:red")
    axis.axhline(trajectory.reward, linestyle=":", color="gray", label="reward of the answer")
    labels = [token.replace("\n", "\\n").strip() or "·" for token in tokens]
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6 if len(labels) < 120 else 3)
    axis.set_ylabel("V(state before the token)")
    axis.set_title(f"{'correct' if right else 'incorrect'}, gold answer {trajectory.gold}", fontsize=9, loc="left")
    axis.legend(fontsize=7)


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
