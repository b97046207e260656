"""What is known exactly of a mixture of Gaussians at every time of a path: density, score, and all predictions."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batches import Mixture
from lightning_modules.processes.paths import Path
from lightning_modules.processes.prediction import Predict

Points = Float[Tensor, "batch d"]
Values = Float[Tensor, " batch"]
Coefficients = Float[Tensor, ""] | Float[Tensor, " batch"]


class NoisedMixture:
    """The law of alpha x_0 + sigma eps for x_0 from a mixture: a mixture with covariances alpha^2 S_k + sigma^2.

    In the axes of S_k, which the path does not turn. alpha and sigma are scalars or one per point.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.log_weights, self.means = mixture.weights.log(), mixture.means
        variances, axes = torch.linalg.eigh(mixture.covariances)
        # variances may be rounded below 0; on the line there is nothing to turn
        self.variances, self.axes = variances.clamp(min=0), axes if axes.shape[1] > 1 else None

    def log_density(self, x: Points, alpha: Coefficients, sigma: Coefficients) -> Values:
        """log p(x)."""
        return self._log_joint(*self._in_axes(x, alpha, sigma)).logsumexp(1)

    def score(self, x: Points, alpha: Coefficients, sigma: Coefficients) -> Points:
        """Gradient of log p."""
        share, whitened, _ = self._posterior(x, alpha, sigma)
        return -self._back(share, whitened)

    def score_divergence(self, x: Points, alpha: Coefficients, sigma: Coefficients) -> Values:
        """Laplacian of log p: sum_k r_k (|g_k|^2 - tr V_k^-1) - |s|^2, g_k the score of component k."""
        share, whitened, variance = self._posterior(x, alpha, sigma)
        inner = (whitened**2).sum(-1) - (1 / variance).sum(-1)
        return (share * inner).sum(1) - (self._back(share, whitened) ** 2).sum(1)

    def mean(self, x: Points, alpha: Coefficients, sigma: Coefficients, p: Coefficients, q: Coefficients) -> Points:
        """E[p x_0 + q eps | x] = sum_k r_k (p mu_k + (p alpha S_k + q sigma) V_k^-1 (x - alpha mu_k)).

        Finite also where alpha or sigma is 0.
        """
        share, whitened, _ = self._posterior(x, alpha, sigma)
        gain = _column(p * alpha, 2) * self.variances + _column(q * sigma, 2)
        return _column(p, 1) * (share @ self.means) + self._back(share, gain * whitened)

    def _in_axes(self, x: Points, alpha: Coefficients, sigma: Coefficients) -> tuple[Tensor, Tensor]:
        """x - alpha mu_k in the axes of each component, and the variances along them."""
        centred = x[:, None] - _column(alpha, 2) * self.means
        variance = _column(alpha, 2) ** 2 * self.variances + _column(sigma, 2) ** 2
        turned = centred if self.axes is None else torch.einsum("kij,nki->nkj", self.axes, centred)
        return turned, variance

    def _log_joint(self, offset: Tensor, variance: Tensor) -> Float[Tensor, "batch component"]:
        square = offset**2 / variance + torch.log(2 * math.pi * variance)
        return self.log_weights - square.sum(-1) / 2

    def _posterior(self, x: Points, alpha: Coefficients, sigma: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
        """Which component x is from, V_k^-1 (x - alpha mu_k) in its axes, and the variances there."""
        offset, variance = self._in_axes(x, alpha, sigma)
        return self._log_joint(offset, variance).softmax(1), offset / variance, variance

    def _back(self, share: Tensor, along_axes: Tensor) -> Points:
        turned = along_axes if self.axes is None else torch.einsum("kij,nkj->nki", self.axes, along_axes)
        return (share[..., None] * turned).sum(1)


def exact(mixture: Mixture, path: Path, kind: str) -> Predict:
    """What a perfect network of this kind predicts, at the ends of the path too."""
    law = NoisedMixture(mixture)

    def predict(x: Points, t: Values) -> Points:
        t = t[0] if (t == t[0]).all() else t
        alpha, sigma = path.alpha(t), path.sigma(t)
        return law.score(x, alpha, sigma) if kind == "score" else law.mean(x, alpha, sigma, *path.weights(kind, t))

    return predict


def _column(values: Coefficients, ones: int) -> Tensor:
    return values[(..., *[None] * (ones if values.ndim else 0))]
