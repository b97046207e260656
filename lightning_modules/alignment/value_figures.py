"""Pictures of what a value function learned."""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from datamodules.batches import Trajectory

SOLUTIONS_LOOKED_AT = 2000


def parting(a: Trajectory, b: Trajectory) -> int:
    """The number of response tokens that two trajectories have in common before they part."""
    pairs = zip(a.response_ids, b.response_ids)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.response_ids), len(b.response_ids)))


def contrasting(trajectories: list[Trajectory]) -> list[Trajectory]:
    """A correct and an incorrect response to one problem that part nearest to the middle; else one of each kind."""
    some = trajectories[:SOLUTIONS_LOOKED_AT]
    right = {t.prompt_id: t for t in some if t.reward > 0}
    wrong = [t for t in some if t.reward <= 0]
    pairs = [(right[t.prompt_id], t) for t in wrong if t.prompt_id in right]
    if pairs:
        return list(min(pairs, key=lambda pair: abs(parting(*pair) / len(pair[1].response_ids) - 0.5)))
    return [*list(right.values())[:1], *wrong[:1]]


@torch.no_grad()
def value_along_solutions(method, trajectories: list[Trajectory]) -> Figure:
    """V of every state along a correct and an incorrect solution of the same problem, token by token."""
    chosen = contrasting(trajectories)
    figure, axes = plt.subplots(
        len(chosen), 1, figsize=(11, 3 * len(chosen)), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, trajectory in zip(axes[:, 0], chosen):
        ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids], device=method.device)
        mask = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool, device=method.device)
        mask[:, len(trajectory.prompt_ids) - 1 :] = True
        values = method.values({"ids": ids, "mask": mask}, method.policy(ids, mask))[mask].tolist()
        tokens = [method.policy.tokenizer.decode([token]) for token in trajectory.response_ids]
        _solution(axis, values, tokens, trajectory)
    if len(chosen) == 2 and chosen[0].prompt_id == chosen[1].prompt_id:
        axes[1, 0].axvline(parting(*chosen), color="gray", linewidth=0.8)
        across = axes[1, 0].get_xaxis_transform()  # tokens along, a fraction of the panel upwards
        axes[1, 0].text(parting(*chosen), 0.02, " here the solutions part", fontsize=7, transform=across)
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
