"""How well log-odds of pairs fit what is known of the pairs: accuracy, likelihood, calibration."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_modules.alignment.preference_embedding import right

BINS = 10


def measure(log_odds: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> dict[str, float]:
    """`pair_accuracy` over pairs that are no tie, `nll` (nats) and `ece`, over all pairs.

    A score of exactly 0 is wrong. `ece` is the mean over ten equal bins of the predicted probability, weighted by their
    pairs, of the distance between mean prediction and mean label.
    """
    probability = torch.sigmoid(log_odds)
    nll = F.binary_cross_entropy_with_logits(log_odds, label)
    accuracy = right(log_odds, label)[label != 0.5].double().mean()
    return {"pair_accuracy": float(accuracy), "nll": float(nll), "ece": calibration_error(probability, label)}


def bins(probability: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> list[tuple[int, float, float]]:
    """(pairs, mean prediction, mean label) of the bins that are not empty."""
    which = (probability * BINS).long().clamp(max=BINS - 1)
    groups = [which == number for number in range(BINS) if (which == number).any()]
    return [(int(g.sum()), float(probability[g].mean()), float(label[g].mean())) for g in groups]


def calibration_error(probability: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> float:
    """Expected calibration error, in [0, 1], of every pair in both orders: data may name the better answer first."""
    probability, label = torch.cat([probability, 1 - probability]), torch.cat([label, 1 - label])
    return sum(count * abs(said - seen) for count, said, seen in bins(probability, label)) / len(label)


def intervals(log_odds: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> dict[str, tuple[float, float]]:
    """95 % intervals of `measure`'s accuracy."""
    verdicts = right(log_odds, label)[label != 0.5]
    return {"pair_accuracy": wilson(int(verdicts.sum()), len(verdicts))}


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, of width above 0 also where all or none succeed."""
    if n == 0:
        return 0.0, 1.0
    centre, spread = successes + z**2 / 2, z * math.sqrt(successes * (n - successes) / n + z**2 / 4)
    return (centre - spread) / (n + z**2), (centre + spread) / (n + z**2)
