"""Win rate of a policy's answers against others to the same prompts, with an interval over prompts."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.alignment.accuracy import bootstrap_interval


class WinRate(Metric):
    """The mean over prompts of the probability that the policy's answer beats the other one, in [0, 1].

    Kept per prompt, so that any number of processes gives the same figures to the last bit: rows are sorted by prompt
    index, and copies of a prompt are dropped. Several answers to one prompt are to be averaged before.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # one-dimensional and of the metric's dtype: what torchmetrics puts in the place of a process without a row
        for name in ("p_win", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, p_win: Float[Tensor, " prompt"], index: Int[Tensor, " prompt"]) -> None:
        """Add prompts: the probability of winning, and their number in the data (below 2^24).

        Raises ValueError where a probability is none.
        """
        wrong = ~((p_win >= 0) & (p_win <= 1))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"the probability of winning at prompt {int(index[row])} is {p_win[row].item()}: an oracle must say a "
                "number in [0, 1]"
            )
        self.p_win.append(p_win.to(self.device, self.dtype))
        self.index.append(index.to(self.device, self.dtype))

    def compute(self) -> Float[Tensor, ""]:
        """The win rate; NaN without a prompt."""
        return self._per_prompt().mean().to(self.device, self.dtype)

    def interval(self, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the win rate over prompts. Every process must call it: rows are gathered."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            values = self._per_prompt()
        return bootstrap_interval(values, seed, resamples, level)

    def _per_prompt(self) -> Float[Tensor, " prompt"]:
        # on the CPU, because not every accelerator has the float64 that keeps the mean independent of the order
        index, order = dim_zero_cat(self.index).cpu().double().sort(stable=True)
        first = torch.cat([torch.tensor([True]), index[1:] != index[:-1]])[: len(index)]
        return dim_zero_cat(self.p_win).cpu().double()[order[first]]
