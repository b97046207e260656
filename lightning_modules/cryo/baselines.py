"""What a prior has to beat: filters, masks and positivity, which need no training."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_modules.cryo.fourier import Maps, filtered, on_shells
from lightning_modules.cryo.operators import FourierOperator


def wiener(observed: Maps, data_weight: Float[Tensor, "*batch shells"]) -> Maps:
    """Every shell times its data weight: the best filter by shell. It cannot change an FSC."""
    return filtered(observed, on_shells(data_weight, observed.shape[-1]))


def soft_masked(observed: Maps, correlation: Float[Tensor, "*batch shells"], threshold: float = 0.15) -> Maps:
    """The observed map under a mask found in its own low-pass: 3^3 maximum, then 3^3 mean of (map F(s) > 0.15 max).

    What lies outside of a particle is noise alone, so a mask raises the FSC without knowing anything of densities. It
    multiplies the map that was not filtered. Densities, not standardised ones: outside must be zero.
    """
    smooth = filtered(observed, on_shells(correlation.clamp(min=0), observed.shape[-1]))
    inside = (smooth > threshold * smooth.amax((-3, -2, -1), keepdim=True)).to(observed.dtype)
    flat = inside.reshape(-1, 1, *inside.shape[-3:])
    mask = F.avg_pool3d(F.max_pool3d(flat, 3, 1, 1), 3, 1, 1)
    return observed * mask.reshape(observed.shape)


def positive(observed: Maps, operator: FourierOperator, rounds: int = 60) -> Maps:
    """Fill what was not measured by setting negative density to zero and putting the measured voxels back, in turns.

    Papoulis and Gerchberg's iteration with positivity: hard to beat without noise where densities are never negative.
    """
    volumes = observed
    for _ in range(rounds):
        volumes = operator.replaced(volumes.clamp(min=0), observed)
    return volumes
