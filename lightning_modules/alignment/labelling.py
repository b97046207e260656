"""From the K answers to a prompt and their table of preferences to pairs to learn from: pure functions.

A table P (K, K) has P[i, j], the probability that answer i beats answer j, and 1/2 on its diagonal.
"""

import random
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WIN_RATES, VALUES = ("raw", "aggregated"), ("win_rate", "score")
RULES, LABELS = ("best_worst", "all", "random"), ("hard", "soft")
SURE = 1e-6  # log-odds are those of probabilities in [SURE, 1 - SURE]: a verifier's are infinite


def log_odds(probabilities: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """s = log P / (1 - P), finite also where P is 0 or 1; in float64, because float32 knows no 1 - 1e-8."""
    return torch.logit(probabilities.double(), eps=SURE).to(probabilities.dtype)


def aggregated(table: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The table sigma(s_i - s_j) of the answers' mean log-odds s_i: the transitive part of the preferences.

    SPPO's released tables are of this kind (uclaml/SPPO scripts/compute_prob.py, which takes the sums of a ranker's
    logits for s_i). Leaves a Bradley-Terry table as it is, and turns a perfect cycle into ties.
    """
    scores = log_odds(table).mean(1)
    return torch.sigmoid(scores[:, None] - scores[None, :])


def win_rates(table: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Mean chance to beat the K answers, an answer itself (1/2) among them (SPPO, arXiv 2405.00675, section 4)."""
    return table.mean(1)


def mean_scores(table: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Mean log-odds against the K answers, an answer itself (0) among them (GPO, arXiv 2410.02197, section 5)."""
    return log_odds(table).mean(1)


def cut_off_loses(
    probability: Float[Tensor, "*shape"], first: Bool[Tensor, "*shape"], second: Bool[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """P(first beats second) where an answer that the length limit cut off loses to one that ended, and ties another.

    `first` and `second` say which answers ended. Without this an oracle would judge fragments, and length would pay.
    """
    return torch.where(first & second, probability, (1.0 + first.to(probability) - second.to(probability)) / 2)


def choose(
    table: Float[Tensor, "k k"],
    answers: list[str],
    rule: Literal["best_worst", "all", "random"],
    generator: random.Random,
) -> list[tuple[int, int]]:
    """Pairs (i, j) of answers of which i is preferred; none where there is nothing to learn.

    `best_worst`: the answers with the highest and the lowest win rate, the first of equals. `all`: every two. `random`:
    two of them. Answers of the same text and even preferences (P = 1/2; for `best_worst` equal win rates) make no pair.
    """
    if rule == "best_worst":
        rates = win_rates(table)
        best, worst = int(rates.argmax()), int(rates.argmin())
        return [(best, worst)] if rates[best] > rates[worst] and answers[best] != answers[worst] else []
    pairs = [(i, j) for i in range(len(table)) for j in range(i + 1, len(table))]
    pairs = [pair for pair in pairs if answers[pair[0]] != answers[pair[1]] and table[pair] != 0.5]
    if rule == "random" and pairs:
        pairs = [generator.choice(pairs)]
    return [(i, j) if table[i, j] > 0.5 else (j, i) for i, j in pairs]


def choices(**given: str) -> None:
    """Raise ValueError where one of `winrate`, `value`, `pairs`, `label` is not among its values."""
    known = {"winrate": WIN_RATES, "value": VALUES, "pairs": RULES, "label": LABELS}
    for name, value in given.items():
        if value not in known[name]:
            raise ValueError(f"model.{name}={value}: there are {', '.join(known[name])}")
