"""Iterated preference optimisation on one prompt: does momentum buy more than a smaller beta? (arXiv 2410.06293)"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import lightning as L
import torch

from datamodules.batches import Bandit
from lightning_modules.theory.momentum import (
    check_momentum,
    exact_fit,
    extrapolated,
    rescaled,
    sampled_fit,
    sampled_pairs,
)
from lightning_modules.theory.simulation import Measured, Simulation


class PreferenceBandit(Simulation):
    """Iterative DPO with momentum `alpha` (APO), `copies` runs of it side by side.

    A round fits `pairs` of answers that the current policy gave, labelled by Bradley-Terry coin flips; `pairs` = 0 are
    all pairs with their true labels. `control="beta_rescaled"` is the run that has to be beaten: no momentum, and
    beta (1 - alpha), whose steps are as long as those that momentum builds up.
    """

    headline: ClassVar[tuple[str, str]] = ("val/reward", "max")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "reward@": "{:.3f}".format,
        "suboptimality@": "{:.4g}".format,
    }
    caption: ClassVar[str] = "mean reward, and what it lacks of the best, by round; 95 % intervals over copies"
    log_log: ClassVar[tuple[str, ...]] = ("suboptimality",)

    def __init__(
        self,
        beta: float,
        alpha: float,
        pairs: int,
        copies: int,
        control: Literal["none", "beta_rescaled"],
        seed: int,
        at: list[int],
    ) -> None:
        super().__init__(at)
        check_momentum(alpha)
        if pairs and copies < 2:
            raise ValueError(f"model.copies={copies}: with sampled labels take at least 2, for the interval")
        controls = {"none": (beta, alpha), "beta_rescaled": (rescaled(beta, alpha), 0.0)}
        if control not in controls:
            raise ValueError(f"model.control={control}: there are {', '.join(controls)}")
        self.beta, self.alpha = controls[control]
        self.pairs, self.copies, self.seed = pairs, copies if pairs else 1, seed

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the rewards of the answers and the policy to start from."""
        super().meet(data)
        bandit = getattr(data, "instance", None)
        if not isinstance(bandit, Bandit) or bandit.reward.shape[:-1] != (1,):
            raise ValueError(
                f"data={data.name} has no rewards of the answers to one prompt: take data=preference_bandit"
            )
        start = bandit.log_reference.expand(self.copies, -1)
        self.register_buffer("reward", bandit.reward[0].clone(), persistent=False)
        self.register_buffer("log_policy", start.clone())
        self.register_buffer("fitted", start.clone())

    def play(self, rounds: list[int]) -> Measured:
        for number in rounds:
            fitted = self._fit(number)
            self.log_policy.copy_(extrapolated(fitted, self.fitted, self.alpha))
            self.fitted.copy_(fitted)
        reward = self.fitted.exp() @ self.reward
        return {"reward": reward, "suboptimality": self.reward.max() - reward}

    def _fit(self, number: int) -> torch.Tensor:
        if not self.pairs:
            return exact_fit(self.log_policy, self.reward, self.beta)
        draw = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number)
        pairs = sampled_pairs(self.log_policy, self.reward, self.pairs, draw)
        return sampled_fit(self.log_policy, *pairs, self.beta)

    def summary(self) -> dict[str, float]:
        """With exact steps what is lacking by round, with sampled labels the mean reward and its intervals."""
        found, dropped = super().summary(), "suboptimality@" if self.pairs else "reward@"
        found = {name: value for name, value in found.items() if not name.startswith(dropped)}
        for n in [int(name.removeprefix("reward@")) for name in found if name.startswith("reward@")]:
            values = self.curves["reward"][self.rounds.index(n)]
            half = 1.96 * float(values.std()) / math.sqrt(len(values))
            found |= {f"reward@{n}_low": found[f"reward@{n}"] - half, f"reward@{n}_high": found[f"reward@{n}"] + half}
        return found
