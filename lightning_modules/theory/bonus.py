"""How wide confidence sets are taken: the radius that multiplies an uncertainty such as 1 / sqrt(n) or |phi|_{V^-1}.

A bonus answers for every setting: tables and linear functions learned online, processes, logs of rewards, logs of
pairs. The papers' orders come without usable constants, or with ones that need 10^5 samples before they help; what is
ours is said. `Scaled` with c = 0 is no bonus at all: the plug-in of every method.
"""

import math

from jaxtyping import Float
from torch import Tensor

Horizon = Float[Tensor, "copy 1 1"]


class Scaled:
    """`c` >= 0 times the width of one confidence interval: the shape of the theorem, a constant of ours."""

    def __init__(self, c: float, delta: float) -> None:
        if not (math.isfinite(c) and c >= 0):
            raise ValueError(f"model.bonus.c={c}: a bonus must not be negative; 0 is none (bonus=none)")
        _check(delta)
        self.c, self.delta = c, delta

    def table(self, noise: float, horizon: Horizon, cells: int) -> Horizon:
        """c sigma sqrt(2 log T), to be divided by sqrt(n)."""
        return self.c * noise * (2 * horizon.log()).sqrt()

    def linear(self, noise: float, horizon: Horizon, features: int, ridge: float) -> Horizon:
        """The same, to be multiplied by |phi|_{V^-1}."""
        return self.table(noise, horizon, features)

    def process(self, noise: float, horizon: int, shape: tuple[int, ...]) -> float:
        """As for tables: c sigma sqrt(2 log T), to be divided by sqrt(n)."""
        return self.c * noise * math.sqrt(2 * math.log(horizon))

    def rewards(self, noise: float, samples: int, cells: int, dimension: int) -> float:
        """c sigma sqrt(2 log(2 K / delta)), to be divided by sqrt(n)."""
        return self.c * noise * math.sqrt(2 * math.log(2 * cells / self.delta))

    def preferences(self, samples: int, cells: int, bound: float) -> float:
        """c sqrt(2 log(2 K / delta)) sqrt(4 / (2 n)), to be multiplied by the divergence; 4 = 1 / max sigmoid'."""
        return self.c * math.sqrt(2 * math.log(2 * cells / self.delta) * 4 / (2 * samples))


class Theory:
    """Radii that a proof would use, with probability 1 - `delta`."""

    def __init__(self, delta: float) -> None:
        _check(delta)
        self.delta = delta

    def table(self, noise: float, horizon: Horizon, cells: int) -> Horizon:
        """sigma sqrt(2 log(2 cells T / delta)): Hoeffding's, for all cells and counts at once (ours)."""
        return noise * (2 * (2 * cells * horizon / self.delta).log()).sqrt()

    def linear(self, noise: float, horizon: Horizon, features: int, ridge: float) -> Horizon:
        """sigma sqrt(d log(1 + T/d) + 2 log T) + sqrt(lambda): the self-normalised bound (constants ours)."""
        return noise * (features * (1 + horizon / features).log() + 2 * horizon.log()).sqrt() + math.sqrt(ridge)

    def process(self, noise: float, horizon: int, shape: tuple[int, ...]) -> float:
        """sqrt(sigma^2 + H^2/4) sqrt(2 log(2 H S A T / delta)): Hoeffding's for r + V in [0, H] (ours)."""
        spread = math.sqrt(noise**2 + shape[0] ** 2 / 4)
        return spread * math.sqrt(2 * math.log(2 * math.prod(shape) * horizon / self.delta))

    def rewards(self, noise: float, samples: int, cells: int, dimension: int) -> float:
        """beta sqrt(n), beta = sqrt(128 log(2 N_G(eps) / delta) / (3 n)) + 18 eps (arXiv 2502.06051, v3).

        With log N_G(eps) = d log(1 + 2 / eps) at eps = 1/n. The divergence is that of the logged occupancy, so that
        n D^2 is 1 / n(x, a) once more.
        """
        entropy = dimension * math.log1p(2 * samples)
        return math.sqrt(128 * (entropy + math.log(2 / self.delta)) / 3) + 18 / math.sqrt(samples)

    def preferences(self, samples: int, cells: int, bound: float) -> float:
        """The same beta times exp(B), the price of pairs (arXiv 2411.04625, theorem 4.7; its place here is ours)."""
        return math.exp(bound) * self.rewards(0.0, samples, cells, cells) / math.sqrt(samples)


Bonus = Scaled | Theory


def _check(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"model.bonus.delta={delta} must be a probability between 0 and 1")
