"""Online methods: the regret of every round added up, against log T, beside what a closed form predicts."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.theory.rates import Fitted, band, banded, explained, mean, per_doubling, power
from lightning_modules.theory.simulation import Measured, Simulation


class Regret(Simulation):
    """A simulation whose rounds have a gap; `regret` is the sum of it, `plain_regret` that without regularisation.

    Slopes are fitted to the powers of two from `fit_from` on: what a doubling of the rounds adds, and the power of the
    round. `predicted` is the closed form of the former where there is one. Where copies have horizons of their own, a
    point is the regret at a horizon, as a mean over the copies that have it.
    """

    headline: ClassVar[tuple[str, str]] = ("val/regret", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        "regret@": "{:.1f}".format,
        **{name: "{:.3f}".format for name in ("per_doubling", "predicted", "slope", "plain_slope")},
    }
    predicted: float | None = None
    horizons: tuple[int, ...] = ()

    def __init__(self, eta: float, copies: int, seed: int, fit_from: int, at: list[int]) -> None:
        super().__init__(at)
        check(eta, copies)
        self.eta, self.copies, self.seed, self.fit_from = eta, copies, seed, fit_from

    def begin(self, runs: int) -> None:
        """Nothing has been lost yet, in none of the `runs` copies."""
        for name in ("regret", "plain_regret"):
            self.register_buffer(name, torch.zeros(runs, dtype=torch.float64))

    def add(self, gaps: Float[Tensor, "round copy"], plain: Float[Tensor, "round copy"]) -> Measured:
        """Add the rounds' gaps; what has been lost so far."""
        self.regret += gaps.cumsum(0)[-1]  # in their order, which a sum does not keep
        self.plain_regret += plain.cumsum(0)[-1]
        return {"regret": self.regret.clone(), "plain_regret": self.plain_regret.clone()}

    @property
    def caption(self) -> str:
        """What stands above the table."""
        return (
            f"regret against the regularised optimum at eta={self.eta:g} (beta={1 / self.eta:g}) and its growth per "
            f"doubling of the rounds from {self.fit_from} on; 95 % intervals over {self.copies} copies"
        )

    @property
    def title(self) -> str:
        return f"{self.problem}, eta={self.eta:g}"

    def summary(self) -> dict[str, float]:
        """Regrets at the rounds of `at` or at the horizons, and slopes, each with its interval."""
        found: dict[str, float] = {}
        for name in self.curves:
            measured, curve = self.curve(name)
            shown = [place for place, n in enumerate(measured) if self.horizons or n in self.at]
            found |= {f"{name}@{measured[place]}": float(curve[place].mean()) for place in shown}
            found |= named(name, mean(curve[-1]))
            rounds, values = self.points(name)
            if len(rounds) >= 3:
                found |= named(name.replace("regret", "slope"), power(rounds, values))
        return found | self._growth()

    def _growth(self) -> dict[str, float]:
        rounds, values = self.points("regret")
        if len(rounds) < 3:
            return {}
        found = named("per_doubling", per_doubling(rounds, values)) | {"r2": explained(rounds, values.mean(1))}
        return found | ({"predicted": self.predicted} if self.predicted is not None else {})

    def curve(self, name: str) -> tuple[np.ndarray, Float[np.ndarray, "measured copy"]]:
        """Where it was measured, and a measurement of every copy there: by round, or at the end of every horizon."""
        values = torch.stack(self.curves[name]).numpy()
        if self.horizons:
            ended = [n for n in self.horizons if n <= self.rounds[-1]]
            return np.array(ended), values[-1].reshape(-1, self.copies)[: len(ended)]
        return np.array(self.rounds), values

    def points(self, name: str) -> tuple[np.ndarray, Float[np.ndarray, "point copy"]]:
        """Where slopes are fitted, and a measurement of every copy there."""
        rounds, values = self.curve(name)
        fitted = (rounds >= self.fit_from) & (rounds & (rounds - 1) == 0)
        return rounds[fitted], values[fitted]

    def abscissa(self) -> tuple[str, Sequence[float | int]]:
        return "horizon" if self.horizons else "round", self.curve("regret")[0].tolist()

    def exported(self) -> dict[str, np.ndarray]:
        return banded({name: self.curve(name)[1] for name in self.curves})

    def figures(self) -> dict[str, Figure]:
        """Regret against log T, and both kinds of regret on logarithmic axes; nine copies of ten as a band."""
        figure, (straight, power_law) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
        self._draw(straight, "regret", self._growth_label(), "C0")
        self._draw_prediction(straight)
        for name, colour in (("regret", "C0"), ("plain_regret", "C1")):
            label = {"regret": "regularised", "plain_regret": "plain, max r - E r"}[name]
            self._draw(power_law, name, label + self._power_label(name), colour)
        figure.suptitle(self.title)
        straight.set(xlabel="T", ylabel="regret")
        power_law.set(yscale="log", xlabel="T", ylabel="regret")
        for axis in (straight, power_law):
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=8, loc="upper left")
            axis.grid(alpha=0.25)
        return {"regret": figure}

    def _draw(self, axis: Axes, name: str, label: str, colour: str) -> None:
        rounds, values = self.curve(name)
        marker = {"marker": "o", "markersize": 4} if self.horizons else {}
        axis.plot(rounds, values.mean(1), color=colour, label=label, **marker)
        if values.shape[1] > 1:
            axis.fill_between(rounds, *band(values), color=colour, alpha=0.15, lw=0)

    def _draw_prediction(self, axis: Axes) -> None:
        """The predicted slope, through the last point: a closed form says nothing of the first rounds."""
        rounds, values = self.points("regret")
        if self.predicted is None or self.horizons or len(rounds) < 3:
            return
        line = values[-1].mean() + self.predicted * np.log2(rounds / rounds[-1])
        axis.plot(rounds, line, "k--", lw=1.2, label=f"predicted, {self.predicted:.3g} per doubling")

    def _growth_label(self) -> str:
        found = self._growth()
        if not found:
            return "regret"
        interval = "[{per_doubling_low:.3g}, {per_doubling_high:.3g}]" if "per_doubling_low" in found else ""
        return f"measured, {{per_doubling:.3g}} {interval} per doubling".format(**found)

    def _power_label(self, name: str) -> str:
        rounds, values = self.points(name)
        return f", slope {power(rounds, values).value:.2f}" if len(rounds) >= 3 and values.mean(1).min() > 0 else ""


def named(name: str, fitted: Fitted) -> dict[str, float]:
    """A fitted number under its name, with its interval where there is one."""
    if math.isnan(fitted.low):
        return {name: fitted.value}
    return {name: fitted.value, f"{name}_low": fitted.low, f"{name}_high": fitted.high}


def check(eta: float, copies: int) -> None:
    """Raise ValueError unless the temperature is positive and there is something to simulate."""
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"model.eta={eta} must be positive: it is the inverse temperature, 1 / beta")
    if copies < 1:
        raise ValueError(f"model.copies={copies} must be positive")
