"""Deterministic samplers: steps t -> u of the probability-flow equation, and the loop over a grid, written once.

A sampler is a class with one method, `step`. None of them knows what the path is or what the network predicts. At the
ends of a path log(alpha / sigma) is infinite: there, and only in that step, methods of higher order fall back to a
lower one, so that a last step onto t = 0 returns the predicted data.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_modules.processes.grids import check_grid
from lightning_modules.processes.paths import Path, State, Time, combined
from lightning_modules.processes.prediction import Prediction

Step = tuple[State, Any]  # the new state, and what the sampler wants to see again in the next step


class Sampler:
    """A step t -> u. `order` is that of its global error, `evaluations` are those of the network in a step."""

    space: ClassVar[str] = "euclidean"
    order: ClassVar[int]
    evaluations: ClassVar[int]

    def step(self, prediction: Prediction, x: State, t: Time, u: Time, memory: Any) -> Step:
        """The state at u from that at t; `memory` is None at first, then what the last step returned."""
        raise NotImplementedError


class Euler(Sampler):
    """x + (u - t) dx/dt, in the clock of the path."""

    order, evaluations = 1, 1

    def step(self, prediction: Prediction, x: State, t: Time, u: Time, memory: Any) -> Step:
        return moved(x, u - t, prediction.drift(x, t)), None


class DDIM(Sampler):
    """The predicted data, equivalently the noise, frozen: (sigma_u / sigma_t) x + alpha_u (1 - e^-l) x_0.

    l = lambda_u - lambda_t. It is DPM-Solver-1 and DPM-Solver++(1), and flow matching's Euler (arXiv 2010.02502).
    """

    order, evaluations = 1, 1

    def step(self, prediction: Prediction, x: State, t: Time, u: Time, memory: Any) -> Step:
        return _towards(prediction.path, x, prediction.data(x, t), t, u), None


class Guarded(Sampler):
    """A step by `inner`, and by `fallback` for those samples where `singular` says that `inner` has no values."""

    fallback: ClassVar[Sampler] = DDIM()

    def step(self, prediction: Prediction, x: State, t: Time, u: Time, memory: Any) -> Step:
        singular = self.singular(prediction, t, u)
        if not singular.any():
            return self.inner(prediction, x, t, u), None
        fallen, _ = self.fallback.step(prediction, x, t, u, None)
        if singular.all():
            return fallen, None
        # whatever the other samples compute: times of theirs keep the singular ones finite, and are not used
        t, u = (time.masked_fill(singular, time[~singular][0].item()) for time in (t, u))
        regular = self.inner(prediction, x, t, u)
        return torch.where(singular.reshape(-1, *[1] * (x.ndim - 1)), fallen, regular), None

    def singular(self, prediction: Prediction, t: Time, u: Time) -> Bool[Tensor, "*times"]:
        """Where log(alpha / sigma) is infinite at one end of the step."""
        return torch.isinf(prediction.path.log_snr(t)) | torch.isinf(prediction.path.log_snr(u))

    def inner(self, prediction: Prediction, x: State, t: Time, u: Time) -> State:
        raise NotImplementedError


class ExponentialIntegrator(Guarded):
    """The score frozen, the linear part exact: e^h x + (e^h - 1) s on the VP path (arXiv 2410.14237)."""

    order, evaluations = 1, 1

    def singular(self, prediction: Prediction, t: Time, u: Time) -> Bool[Tensor, "*times"]:
        """Where no data is left, so that the linear part is infinite; at u = 0 it is finite."""
        return prediction.path.alpha(t) == 0

    def inner(self, prediction: Prediction, x: State, t: Time, u: Time) -> State:
        path = prediction.path
        return combined(_shrunk(path, t, u), path.score_gain(t, u), x, prediction.score(x, t))


class VEDDIM(Guarded):
    """Euler in sigma / alpha for x / alpha, where the equation is d(x / alpha) = eps d(sigma / alpha); equals DDIM."""

    order, evaluations = 1, 1

    def inner(self, prediction: Prediction, x: State, t: Time, u: Time) -> State:
        return _in_ratio(prediction.path, x, prediction.noise(x, t), t, u)


class EDMHeun(Guarded):
    """Heun in sigma / alpha for x / alpha (arXiv 2206.00364, algorithm 1)."""

    order, evaluations = 2, 2

    def inner(self, prediction: Prediction, x: State, t: Time, u: Time) -> State:
        noise = prediction.noise(x, t)
        then = prediction.noise(_in_ratio(prediction.path, x, noise, t, u), u)
        return _in_ratio(prediction.path, x, (noise + then) / 2, t, u)


class DPM2(Guarded):
    """DPM-Solver-2: the noise at the middle of the step in lambda (arXiv 2206.00927, algorithm 1)."""

    order, evaluations = 2, 2

    def inner(self, prediction: Prediction, x: State, t: Time, u: Time) -> State:
        path = prediction.path
        middle = path.time((path.log_snr(t) + path.log_snr(u)) / 2)
        half = _with_noise(path, x, prediction.noise(x, t), t, middle)
        return _with_noise(path, x, prediction.noise(half, middle), t, u)


class DPMpp2M(Sampler):
    """DPM-Solver++(2M): data extrapolated in lambda from the last two steps (arXiv 2211.01095, algorithm 2).

    The first step, and one onto t = 0, are DDIM's.
    """

    order, evaluations = 2, 1

    def step(self, prediction: Prediction, x: State, t: Time, u: Time, memory: Any) -> Step:
        path, data = prediction.path, prediction.data(x, t)
        length = path.log_snr(u) - path.log_snr(t)
        if memory is None:
            return _towards(path, x, data, t, u), (data, length)
        before, length_before = memory
        share = torch.where(torch.isinf(length), 0.0, length / (2 * length_before))
        return _towards(path, x, combined(1 + share, -share, data, before), t, u), (data, length)


class Heun(Guarded):
    """Heun's method in the clock of the path: the mean of dx/dt at both ends of an Euler step."""

    order, evaluations = 2, 2
    fallback = Euler()

    def singular(self, prediction: Prediction, t: Time, u: Time) -> Bool[Tensor, "*times"]:
        """Where the prediction does not determine dx/dt at the end of the step."""
        return ~prediction.determines("drift", u)

    def inner(self, prediction: Prediction, x: State, t: Time, u: Time) -> State:
        drift = prediction.drift(x, t)
        return moved(x, u - t, (drift + prediction.drift(moved(x, u - t, drift), u)) / 2)


class Midpoint(Sampler):
    """dx/dt at the middle of the step in the clock of the path."""

    order, evaluations = 2, 2

    def step(self, prediction: Prediction, x: State, t: Time, u: Time, memory: Any) -> Step:
        half = moved(x, (u - t) / 2, prediction.drift(x, t))
        return moved(x, u - t, prediction.drift(half, (t + u) / 2)), None


class RK4(Heun):
    """Runge and Kutta's classical method in the clock of the path; the midpoint rule where Heun would fall back."""

    order, evaluations = 4, 4
    fallback = Midpoint()

    def inner(self, prediction: Prediction, x: State, t: Time, u: Time) -> State:
        h, middle = u - t, (t + u) / 2
        k1 = prediction.drift(x, t)
        k2 = prediction.drift(moved(x, h / 2, k1), middle)
        k3 = prediction.drift(moved(x, h / 2, k2), middle)
        k4 = prediction.drift(moved(x, h, k3), u)
        return moved(x, h, (k1 + 2 * k2 + 2 * k3 + k4) / 6)


def continuous(sampler: Any) -> Sampler:
    """The sampler, where its states are real numbers; else a TypeError that says which are."""
    if getattr(sampler, "space", None) != "euclidean":
        raise TypeError(
            f"model.sampler={type(sampler).__name__} does not step in a space of real numbers: take euler, ddim, heun, "
            "dpm2, dpmpp_2m, midpoint, rk4, or another subclass of lightning_modules.processes.ode.Sampler"
        )
    return sampler


def sample(
    sampler: Sampler,
    prediction: Prediction,
    x: State,
    grid: Float[Tensor, "times *batch"],
    trajectory: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "..."]:
    """The state at the end of the grid from `x` at its beginning; with `trajectory` the states at all of its times.

    `grid` falls strictly, for all samples together or, with a second dimension, for each of them. `progress` is told
    steps done and steps in all. Raises ValueError for a grid that does not fall or leaves the path.
    """
    check_grid(prediction.path, grid)
    return _along(sampler, prediction, x, grid, trajectory, progress)


def encode(sampler: Sampler, prediction: Prediction, x: State, grid: Float[Tensor, "times *batch"]) -> State:
    """The way back: the state at the beginning of the grid from `x` at its end, which must lie above t = 0."""
    check_grid(prediction.path, grid)
    if not (grid[-1] > 0).all():
        raise ValueError("the grid ends at t=0, where no noise can be read off the data: end it above, such as at 1e-3")
    return _along(sampler, prediction, x, grid.flip(0), False, None)


def _along(
    sampler: Sampler,
    prediction: Prediction,
    x: State,
    grid: Float[Tensor, "times *batch"],
    trajectory: bool,
    progress: Callable[[int, int], None] | None,
) -> Float[Tensor, "..."]:
    states, memory = [x], None
    for done, (t, u) in enumerate(pairwise(grid.double()), start=1):
        x, memory = sampler.step(prediction, x, t, u, memory)
        if trajectory:
            states.append(x)
        if progress is not None:
            progress(done, len(grid) - 1)
    return torch.stack(states) if trajectory else x


def moved(x: State, h: Time, drift: State) -> State:
    """x + h dx/dt; h is one number, or one for each sample."""
    return combined(torch.ones_like(h), h, x, drift)


def _towards(path: Path, x: State, data: State, t: Time, u: Time) -> State:
    """(sigma_u / sigma_t) x + alpha_u (1 - e^-l) x_0: finite where alpha_t = 0 and where sigma_u = 0."""
    length = path.log_snr(u) - path.log_snr(t)
    return combined(path.sigma(u) / path.sigma(t), -path.alpha(u) * torch.expm1(-length), x, data)


def _with_noise(path: Path, x: State, noise: State, t: Time, u: Time) -> State:
    """(alpha_u / alpha_t) x - sigma_u (e^l - 1) eps."""
    length = path.log_snr(u) - path.log_snr(t)
    return combined(_shrunk(path, t, u), -path.sigma(u) * torch.expm1(length), x, noise)


def _in_ratio(path: Path, x: State, noise: State, t: Time, u: Time) -> State:
    """alpha_u (x / alpha_t + (sigma_u / alpha_u - sigma_t / alpha_t) eps)."""
    ratio_t, ratio_u = (path.sigma(time) / path.alpha(time) for time in (t, u))
    return combined(_shrunk(path, t, u), path.alpha(u) * (ratio_u - ratio_t), x, noise)


def _shrunk(path: Path, t: Time, u: Time) -> Time:
    return path.alpha(u) / path.alpha(t)
