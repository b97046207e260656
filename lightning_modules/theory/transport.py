"""How far the output of a deterministic map is from a density, by change of variables instead of samples."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Points = Float[Tensor, "batch d"]
Values = Float[Tensor, " batch"]
Flow = Callable[[Points], Points]

NODES = {1: (8.0, 4001), 2: (6.0, 161)}  # half width, and nodes along each axis


class FoldedMap(ValueError):
    """A step was so long that the map is no longer one to one."""


def nodes(d: int, points: int | None = None) -> tuple[Points, float]:
    """Nodes of the trapezoidal rule for the standard normal in 1 or 2 dimensions, and the volume of a cell."""
    if d not in NODES:
        raise ValueError(f"densities in {d} dimensions are not integrated on a grid: take data with 1 or 2 coordinates")
    width, default = NODES[d]
    axis = torch.linspace(-width, width, points or default, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * d).reshape(-1, d), float(axis[1] - axis[0]) ** d


def log_normal(z: Points) -> Values:
    """log density of the standard normal."""
    return -(z**2).sum(1) / 2 - z.shape[1] * math.log(2 * math.pi) / 2


def transported(flow: Flow, z: Points) -> tuple[Points, Values]:
    """flow(z), each point by itself, and log det of its Jacobian by a backward pass for each coordinate.

    Raises FoldedMap where the determinant is not positive.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x = flow(z)
        rows = [torch.autograd.grad(x[:, axis].sum(), z, retain_graph=True)[0] for axis in range(z.shape[1])]
    determinant = torch.linalg.det(torch.stack(rows, dim=1))
    if not (determinant > 0).all():
        raise FoldedMap("the map folds: a step is longer than the inverse of the equation's Lipschitz constant")
    return x.detach(), determinant.log()


def total_variation(log_from: Values, log_to: Values, log_det: Values, volume: float) -> float:
    """1/2 int |q(z) - p(flow(z)) det| dz, in [0, 1]."""
    found = float((log_from.exp() - (log_to + log_det).exp()).abs().sum() * volume / 2)
    if found > 1 + 1e-6:
        raise ValueError(f"a total variation of {found:.3g} is above 1: the nodes are too far apart for this map")
    return found


def kl(log_from: Values, log_to: Values, log_det: Values, volume: float) -> float:
    """int q (log q - log det - log p(flow(z))) dz, that of the output relative to the target."""
    return float((log_from.exp() * (log_from - log_det - log_to)).sum() * volume)


def product_total_variation(log_ratio: Values, z: Values, d: int, draws: int, seed: int) -> tuple[float, float]:
    """The total variation of d independent copies of a map on the line, and its standard error.

    1/2 E|1 - exp(-sum_i r(z_i))| over standard normal z, with r = log q - log det - log p(flow) given at the nodes.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(draws, dtype=torch.float64)
    for _ in range(d):
        total += interpolated(log_ratio, z, torch.randn(draws, generator=generator, dtype=torch.float64))
    terms = torch.expm1(-total).abs() / 2
    return float(terms.mean()), float(terms.std() / math.sqrt(draws))


def interpolated(values: Values, nodes: Values, at: Values) -> Values:
    """Linear interpolation between equally spaced nodes; constant beyond."""
    place = ((at - nodes[0]) / (nodes[1] - nodes[0])).clamp(0, len(nodes) - 1)
    left = place.long().clamp(max=len(nodes) - 2)
    return torch.lerp(values[left], values[left + 1], place - left)


def gaussian_total_variation(ratio: float, d: int) -> float:
    """Between N(0, I) and N(0, ratio I) in d dimensions: |F_d(c) - F_d(c / ratio)|.

    The densities cross where |x|^2 = c = d ratio ln(ratio) / (ratio - 1); F_d is the distribution
    function of chi^2 with d degrees of freedom.
    """
    if ratio == 1:
        return 0.0
    crossing = d * ratio * math.log(ratio) / (ratio - 1)
    half = torch.tensor(d / 2, dtype=torch.float64)
    ends = torch.tensor([crossing, crossing / ratio], dtype=torch.float64) / 2
    low, high = torch.special.gammainc(half, ends).tolist()
    return abs(low - high)
