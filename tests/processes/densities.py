"""Exact predictions on a mixture in one dimension, written down once more as the oracle of the samplers."""

import torch
from torch import Tensor

WEIGHTS, MEANS, WIDTH = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.4, 0.6]).double(), 0.4


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 1))


def mixture_noise(path):
    """eps(x, t) of w = (0.3, 0.7), mu = (-1.4, 0.6), S = 0.4, in each coordinate."""

    def noise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = column(path.alpha(t), x), column(path.sigma(t), x)
        variance = (alpha * WIDTH) ** 2 + sigma**2
        offset = alpha[..., None] * MEANS.to(x) - x[..., None]
        share = (WEIGHTS.log().to(x) - offset**2 / (2 * variance[..., None])).softmax(-1)
        return -sigma * (share * offset).sum(-1) / variance

    return noise


def mixture_score(path):
    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = column(path.alpha(t), x), column(path.sigma(t), x)
        variance = (alpha * WIDTH) ** 2 + sigma**2
        offset = alpha[..., None] * MEANS.to(x) - x[..., None]
        share = (WEIGHTS.log().to(x) - offset**2 / (2 * variance[..., None])).softmax(-1)
        return (share * offset).sum(-1) / variance

    return score
