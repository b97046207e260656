"""Offline methods: the exact gap of what is learned from n samples, against n, beside what a closed form predicts."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.theory.rates import band, banded, crossing, mean, power
from lightning_modules.theory.regret import check, named
from lightning_modules.theory.simulation import Simulation


class Samples(Simulation):
    """A simulation whose rounds are samples, and which measures `gap`.

    `slope` is that of log gap over log n from `fit_from` samples on. `n_gap` is n times the gap at the end, which tends
    to `predicted` where the gap falls as 1/n.
    """

    headline: ClassVar[tuple[str, str]] = ("val/gap", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "gap@": "{:.2g}".format,
        **{name: "{:.3g}".format for name in ("slope", "n_gap", "predicted")},
    }
    predicted: float | None = None

    def __init__(self, eta: float, copies: int, seed: int, fit_from: int, eps: list[float], at: list[int]) -> None:
        super().__init__(at)
        check(eta, copies)
        self.eta, self.copies, self.seed, self.fit_from, self.eps = eta, copies, seed, fit_from, eps

    @property
    def caption(self) -> str:
        """What stands above the table."""
        return (
            f"what the learned policy lacks of the regularised optimum at eta={self.eta:g} (beta={1 / self.eta:g}) "
            f"after n samples; slope over log n from {self.fit_from} on; 95 % intervals over {self.copies} data sets"
        )

    def abscissa(self) -> tuple[str, Sequence[float | int]]:
        return "samples", self.rounds

    def exported(self) -> dict[str, np.ndarray]:
        return banded({"gap": self.gaps()[1]})

    @property
    def title(self) -> str:
        return f"{self.problem}, eta={self.eta:g}"

    def gaps(self) -> tuple[np.ndarray, Float[np.ndarray, "point copy"]]:
        """Where it was measured, and the gap of every copy there."""
        return np.array(self.rounds), torch.stack(self.curves["gap"]).numpy()

    def summary(self) -> dict[str, float]:
        """Gaps and their upper quantiles at the rounds of `at`, the slope, the constant, and samples for a gap eps."""
        rounds, values = self.gaps()
        found = {"gap": float(values[-1].mean())}
        for place in [self.rounds.index(n) for n in self.at if n in self.rounds]:
            found[f"gap@{rounds[place]}"] = float(values[place].mean())
            found[f"q95_gap@{rounds[place]}"] = float(np.quantile(values[place], 0.95))
        fitted = rounds >= self.fit_from
        if fitted.sum() >= 3 and falls(values[fitted].mean(1)):
            found |= named("slope", power(rounds[fitted], values[fitted]))
        found |= named("n_gap", mean(rounds[-1] * values[-1]))
        if self.predicted is not None:
            found["predicted"] = self.predicted
        needed = {f"samples_for@{eps:g}": crossing(rounds, values.mean(1), eps) for eps in self.eps}
        return found | {name: n for name, n in needed.items() if np.isfinite(n)} | self.constants()

    def constants(self) -> dict[str, float]:
        """Numbers of the problem that stand beside those of the method."""
        return {}

    def figures(self) -> dict[str, Figure]:
        """The gap and n times the gap against n; nine data sets of ten, and the mean's 95 % interval, as bands."""
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
        rounds, values = self.gaps()
        self._draw(left, rounds, values)
        scaled = rounds[:, None] * values
        centre, half = scaled.mean(1), 1.96 * scaled.std(1) / np.sqrt(values.shape[1])
        right.plot(rounds, centre, "C0", marker="o", markersize=4, label="n x mean gap, 95 % interval")
        right.fill_between(rounds, centre - half, centre + half, color="C0", alpha=0.25, lw=0)
        if self.predicted is not None:
            left.plot(rounds, self.predicted / rounds, "k--", lw=1.2, label=f"predicted, {self.predicted:.3g} / n")
            right.axhline(self.predicted, color="k", ls="--", lw=1.2, label="predicted")
        left.set(xscale="log", yscale="log", xlabel="samples n", ylabel="gap")
        if values.min() > 0 and np.ptp(np.log(values)) < 1e-9:  # of a policy that does not learn
            left.set_ylim(values.min() / 10, values.max() * 10)
        figure.suptitle(self.title)
        top = scaled.mean(1).max()
        wide = top > 20 * max(scaled.mean(1)[-1], 1e-300)
        right.set(xscale="log", yscale="log" if wide else "linear", xlabel="samples n", ylabel="n x gap")
        for axis in (left, right):
            axis.legend(fontsize=8)
            axis.grid(alpha=0.25)
        return {"gap": figure}

    def _draw(self, axis: Axes, rounds: np.ndarray, values: Float[np.ndarray, "point copy"]) -> None:
        fitted = rounds >= self.fit_from
        label = "measured"
        if fitted.sum() >= 3 and falls(values[fitted].mean(1)):
            found = power(rounds[fitted], values[fitted])
            label = f"measured, slope {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
        axis.plot(rounds, values.mean(1), "C0", marker="o", markersize=4, label=label)
        low, high = band(values)
        axis.fill_between(rounds, np.maximum(low, high * 1e-4), high, color="C0", alpha=0.15, lw=0)


def falls(means: Float[np.ndarray, " point"]) -> bool:
    """Whether a slope says something: a policy that does not learn has a constant gap, the oracle none."""
    return bool(means.min() > 0 and np.ptp(np.log(means)) > 1e-9)
