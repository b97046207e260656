"""Pictures of what a policy learned from pairs."""

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor


def preferences(rewards: Float[Tensor, "pair 2"], what: str) -> Figure:
    """Implicit rewards beta log(pi / pi_ref) of the better (first) and of the worse response: margins, and both.

    A method of differences may lower both responses: then the cloud on the right lies left of zero and below it.
    """
    better, worse = rewards.float().cpu().unbind(1)
    margins = better - worse
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.hist(margins.numpy(), bins=30, color="tab:gray")
    left.axvline(0, color="black", linewidth=0.8)
    left.set(xlabel="reward of the better minus that of the worse response", ylabel="pairs")
    left.set_title(f"{len(rewards)} {what} pairs, {(margins > 0).float().mean():.0%} in order", fontsize=9, loc="left")
    right.scatter(better.numpy(), worse.numpy(), s=8, c=["tab:green" if m > 0 else "tab:red" for m in margins])
    right.axline((0, 0), slope=1, color="gray", linewidth=0.8)
    for line in (right.axvline, right.axhline):
        line(0, color="black", linewidth=0.5)
    right.set(xlabel="reward of the better response", ylabel="of the worse response")
    right.set_title("below the diagonal the better one is ahead", fontsize=9, loc="left")
    return figure
