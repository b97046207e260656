"""Momentum in policy space: what Accelerated Preference Optimization adds to an iterative loop (arXiv 2410.06293).

    pi_{t+1}(y|x) = pihat_{t+1}(y|x) ( pihat_{t+1}(y|x) / pihat_t(y|x) )^alpha / Z'_t(x),

where pihat_t are the policies that were fitted and pi_t those that are sampled from and referred to. (TRL's `apo_zero`
and `apo_down` are Anchored Preference Optimization, arXiv 2408.06266, which this is not.)
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.sharding import placed, whole


def check_momentum(alpha: float) -> None:
    """Raise ValueError unless `alpha` is in (-1, 1): at 1 the steps add up to T^2 / 2 and nothing converges."""
    if not -1 < alpha < 1:
        raise ValueError(f"model.alpha={alpha}: the momentum must be below 1 (and above -1); take 0.3")


def plain_steps(alpha: float, iterations: int) -> float:
    """c_T: after T exact rounds with momentum the policy is where c_T rounds without it would lead.

    Under Bradley-Terry preferences with reward r, log pihat_{T+1} = log pi_ref + c_T r / beta + const, with

        c_T = sum_{t=1}^T (1 - alpha^t) / (1 - alpha) = T / (1 - alpha) - alpha (1 - alpha^T) / (1 - alpha)^2,

    so that every round tends to the worth of 1 / (1 - alpha) (our derivation). Raises ValueError as `check_momentum`.
    """
    check_momentum(alpha)
    return iterations / (1 - alpha) - alpha * (1 - alpha**iterations) / (1 - alpha) ** 2


def extrapolated_log_probs(
    fitted: Float[Tensor, "*shape"], previous: Float[Tensor, "*shape"], alpha: float
) -> Float[Tensor, "*shape"]:
    """(1 + alpha) log pihat_{t+1} - alpha log pihat_t (nats), which lacks log Z'_t(x).

    Exact as a reference where a loss compares two answers to one prompt by their difference (DPO, IPO, hinge).
    """
    return fitted + alpha * (fitted - previous)


@torch.no_grad()
def fitted_weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained, in float32 (or what it has beyond that) and the CPU's memory, whole, by name.

    Tied weights are there once, buffers are not. Collective where the module is sharded.
    """
    return {name: _precise(whole(parameter)).cpu() for name, parameter in _parameters(module).items()}


@torch.no_grad()
def extrapolate_(module: nn.Module, previous: Mapping[str, Tensor], alpha: float) -> None:
    """theta + alpha (theta - theta_previous) in the place of theta, computed in float32.

    Exact where log-probabilities are linear in the parameters up to normalisation (a table of logits), an approximation
    in a network. `previous` is what `fitted_weights` returned of the same module. Buffers and integers stay, tied
    weights move once, and alpha = 0 touches nothing. Raises ValueError where the parameters have other names, or are
    of less than float32: at a learning rate of 5e-7 their difference would be rounding noise.
    """
    if not alpha:
        return
    parameters = _parameters(module)
    if parameters.keys() != previous.keys():
        name = next(iter(parameters.keys() ^ previous.keys()))
        raise ValueError(f"the previous weights are of another model, {name} is in one only: start anew, resume=never")
    for name, parameter in parameters.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(
                f"{name} is {parameter.dtype}, too coarse for the difference of two iterations: take "
                "policy.dtype=float32, with trainer.precision=bf16-mixed for the speed"
            )
        parameter += alpha * (parameter - placed(previous[name], parameter))


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    # named_parameters has a tied weight once, and no buffers
    return {name: p for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
