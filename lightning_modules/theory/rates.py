"""Rates fitted to curves of many copies, with confidence intervals by the jackknife over the copies."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

Copies = Float[np.ndarray, "point copy"]


class Fitted(NamedTuple):
    """A number with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def jackknife(statistic: Callable[[Float[np.ndarray, "point group"]], np.ndarray], values: Copies) -> Fitted:
    """A statistic of the mean over copies (a column of means in, a number for each out), leaving each copy out once.

    With a single copy there is no interval: it is NaN.
    """
    copies = values.shape[1]
    whole = float(statistic(values.mean(1, keepdims=True))[0])
    if copies < 2:
        return Fitted(whole, math.nan, math.nan)
    without = statistic((values.sum(1, keepdims=True) - values) / (copies - 1))
    error = math.sqrt((copies - 1) / copies * float(((without - without.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.975, copies - 1)) * error
    return Fitted(whole, whole - half, whole + half)


def band(values: Copies) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Between which nine copies of ten lie."""
    low, high = np.quantile(values, [0.05, 0.95], axis=1)
    return low, high


def banded(curves: dict[str, Copies]) -> dict[str, Float[np.ndarray, " point"]]:
    """The means over copies, each with its 95 % interval where there are several."""
    found = {}
    for name, values in curves.items():
        found[name], copies = values.mean(1), values.shape[1]
        if copies > 1:
            half = stats.t.ppf(0.975, copies - 1) * values.std(1, ddof=1) / math.sqrt(copies)
            found[f"{name}_low"], found[f"{name}_high"] = found[name] - half, found[name] + half
    return found


def mean(values: Float[np.ndarray, " copy"]) -> Fitted:
    """The mean over copies."""
    return jackknife(lambda means: means[0], values[None])


def per_doubling(rounds: np.ndarray, values: Copies) -> Fitted:
    """b in a + b log2(round), by least squares: what a doubling of the rounds adds."""
    contrast = _contrast(np.log2(rounds))
    return jackknife(lambda means: contrast @ means, values)


def power(rounds: np.ndarray, values: Copies) -> Fitted:
    """d log(value) / d log(round), by least squares on the logarithm of the mean."""
    contrast = _contrast(np.log(rounds))
    return jackknife(lambda means: contrast @ np.log(np.maximum(means, 1e-300)), values)


def explained(rounds: np.ndarray, values: Float[np.ndarray, " point"]) -> float:
    """R^2 of a + b log2(round)."""
    return float(np.corrcoef(np.log2(rounds), values)[0, 1] ** 2)


def crossing(rounds: np.ndarray, values: Float[np.ndarray, " point"], level: float) -> float:
    """The round from which on the value stays below `level`, interpolated on logarithmic axes; NaN if there is none."""
    above = np.flatnonzero(values > level)
    if not len(above) or above[-1] + 1 == len(values):
        return math.nan
    pair = slice(above[-1], above[-1] + 2)
    x, y = np.log(rounds[pair]), np.log(values[pair])
    return float(np.exp(x[0] + (math.log(level) - y[0]) / (y[1] - y[0]) * (x[1] - x[0])))


def _contrast(x: np.ndarray) -> np.ndarray:
    """The weights whose product with values is their slope over x."""
    centred = x - x.mean()
    return centred / (centred**2).sum()
