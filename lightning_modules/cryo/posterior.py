"""Flow posterior sampling: a prior over densities, bent towards what was measured (arXiv 2410.08631, section 3).

On the path x_t = (1 - t) x_0 + t eps, Bayes gives v(x_t | y) = v(x_t) - t / (1 - t) grad log p(y | x_t). What differs
between guidances is what they put for the likelihood of a state that is still noisy. Each is a hook of
`processes.Prediction`: it sees state, times, predicted data and velocity, and returns the velocity.

Everything here is in the units of the prior, z = (density / scale - mean) / std: `Operator.standardised` takes a
measurement there.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.cryo.operators import FourierOperator, Operator
from lightning_modules.processes.ode import Sampler, sample
from lightning_modules.processes.prediction import Prediction

State = Float[Tensor, "batch *shape"]
Times = Float[Tensor, " batch"]
Progress = Callable[[int, int], None]


@runtime_checkable
class Guidance(Protocol):
    """A way to bend a prior towards a measurement; `differentiates` where it needs d data / d state."""

    differentiates: ClassVar[bool]

    def __call__(
        self, operator: Operator, measured: Tensor, x: State, t: Times, data: State, velocity: State
    ) -> State: ...


class Normalised:
    """Published guidance in a form that does not depend on steps or size: v + kappa w sqrt(d) g / |g|.

    g is the gradient of the misfit of the predicted data, of which only the direction is taken, for every map by
    itself; w = min(t / (1 - t), `cap`). The published 1000 steps of a fixed length are `kappa` = 1000 / 64^(3/2) =
    1.953 at any number of steps. What it samples is sharper than the posterior: its variance collapses.
    """

    differentiates: ClassVar[bool] = True

    def __init__(self, kappa: float = 1.0, cap: float = 5.0) -> None:
        if not kappa > 0 or not cap > 0:
            raise ValueError(f"guidance.kappa={kappa} and guidance.cap={cap} must be positive")
        self.kappa, self.cap = kappa, cap

    def __call__(self, operator: Operator, measured: Tensor, x: State, t: Times, data: State, velocity: State) -> State:
        slope = torch.autograd.grad(operator.misfit(data, measured).sum(), x)[0]
        length = slope.flatten(1).norm(dim=1).clamp(min=torch.finfo(slope.dtype).tiny)
        weight = (t / (1 - t)).clamp(max=self.cap) * self.kappa * x[0].numel() ** 0.5
        return velocity + _per_sample(weight / length, x) * slope


class PiGDM:
    """Guidance that is exact for data of independent unit Gaussians (Song et al. 2023, for Fourier noise spectra).

    The variance of x_0 given x_t, r^2 = t^2 / (t^2 + (1 - t)^2), widens the noise to S + r^2 N^3 A A^T, and the
    gradient has its true weight t / (1 - t). At t = 1, where the weight is infinite and the state tells nothing of the
    data, the velocity is the prior's; `cap` bounds the weight of a network there.
    """

    differentiates: ClassVar[bool] = True

    def __init__(self, cap: float = 1000.0) -> None:
        if not cap > 0:
            raise ValueError(f"guidance.cap={cap} must be positive")
        self.cap = cap

    def __call__(self, operator: Operator, measured: Tensor, x: State, t: Times, data: State, velocity: State) -> State:
        spread = _per_sample(t.square() / (t.square() + (1 - t).square()), x)
        slope = torch.autograd.grad(operator.misfit(data, measured, spread).sum(), x)[0]
        weight = torch.where(t < 1, (t / (1 - t)).clamp(max=self.cap), 0.0)
        return velocity + _per_sample(weight, x) * slope


class Replacement:
    """Hard data consistency for measurements without noise: predicted data get the measured voxels, v = (x - x_0) / t.

    No gradient. At t = 0 there is nothing left to move.
    """

    differentiates: ClassVar[bool] = False

    def __call__(self, operator: Operator, measured: Tensor, x: State, t: Times, data: State, velocity: State) -> State:
        towards = (x - _replaced(operator, data, measured)) / _per_sample(t, x)
        return torch.where(_per_sample(t, x) > 0, towards, velocity)


def conditioned(prior: Prediction, guidance: Guidance, operator: Operator, measured: Tensor) -> Prediction:
    """The prior given a measurement, as a prediction that every sampler takes.

    Where the guidance differentiates, the prior is evaluated once for the velocity and its gradient. Raises ValueError
    where guidance and operator do not fit.
    """
    exact = isinstance(operator, FourierOperator) and operator.exact
    if exact and guidance.differentiates:
        raise ValueError(
            "a measurement without noise cannot be weighed against a prior: take guidance=replacement, or add noise"
        )

    def velocity(x: State, t: Times) -> State:
        with torch.set_grad_enabled(guidance.differentiates):
            x = x.detach().requires_grad_(guidance.differentiates)
            flow = prior.velocity(x, t)
            data = prior.path.convert(x, flow, t, "velocity", "data")
            return guidance(operator, measured, x, t, data, flow).detach()

    return Prediction(prior.path, velocity, "velocity")


def draw(
    prior: Prediction,
    guidance: Guidance,
    operator: Operator,
    measured: Tensor,
    noise: Float[Tensor, "batch n n n"],
    sampler: Sampler,
    grid: Float[Tensor, " times"],
    progress: Progress | None = None,
) -> Float[Tensor, "batch n n n"]:
    """A density for each measurement, from `noise` at the first time of the grid to the data at its last.

    The same noise, prior and measurement give the same density, whatever else is in the batch. After `Replacement` what
    was measured is in it exactly.
    """
    found = sample(sampler, conditioned(prior, guidance, operator, measured), noise, grid, progress=progress)
    return _replaced(operator, found, measured) if isinstance(guidance, Replacement) else found


def _replaced(operator: Operator, volumes: Tensor, measured: Tensor) -> Tensor:
    if not isinstance(operator, FourierOperator):
        raise ValueError(f"guidance=replacement puts Fourier voxels in, and {type(operator).__name__} measures others")
    return operator.replaced(volumes, measured)


def _per_sample(values: Float[Tensor, " batch"], x: State) -> Tensor:
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
