"""Accuracy on problems with a checkable answer: greedy and sampled, pass@k, maj@k, with intervals over prompts."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def pass_at_k(sampled: Int[Tensor, " prompt"], correct: Int[Tensor, " prompt"], k: int) -> Float[Tensor, " prompt"]:
    """Chance that one of k responses drawn from n `sampled` is among the c `correct` (arXiv 2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k) as the product over j < k of (n - c - j) / (n - j), in float64: no factorial overflows,
    and with fewer than k wrong responses one factor is exactly 0. Unbiased. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= int(sampled.min()):
        raise ValueError(
            f"pass@k needs 1 <= k <= sampled responses, but k is {k} of {int(sampled.min())}; lower eval.k"
        )
    drawn = torch.arange(k, device=sampled.device, dtype=torch.float64)
    wrong = (sampled - correct)[:, None] - drawn
    return 1 - (wrong / (sampled[:, None] - drawn)).prod(1)


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> bool:
    """Whether the majority of the normalised `answers` to one prompt is right; `correct` tells it of each of them.

    None (no answer found) has no vote, and a prompt without votes is wrong. Ties go to the answer seen first. Raises
    ValueError when the two differ in length.
    """
    if len(answers) != len(correct):
        raise ValueError(f"maj@k got {len(answers)} answers but {len(correct)} verdicts")
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    # a Counter keeps the order of first sight, and max takes the first of equals
    winner = max(votes, key=votes.__getitem__)
    return bool(correct[list(answers).index(winner)])


def bootstrap_interval(
    values: Float[Tensor, " prompt"], seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts, in the units of `values`.

    The same seed draws the same prompts for each metric of one evaluation. Raises ValueError unless `level` is in
    (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must be in (0, 1), but is {level}")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double().cpu()[draws].mean(1)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


class AnswerAccuracy(Metric):
    """Scores of an evaluation, kept per prompt so that any number of processes gives the same figures.

    `k` responses are sampled per prompt (0: none), and one is decoded greedily if `greedy`. Every metric is a mean over
    prompts; rows are sorted by prompt index, and the copies that a distributed sampler appends are dropped.
    """

    full_state_update = False
    higher_is_better = True
    # one-dimensional and of the metric's dtype: what torchmetrics puts in the place of a process without a row
    COLUMNS = ("index", "greedy_correct", "sampled", "correct", "majority_correct", "extracted", "finished", "length")

    def __init__(self, k: int = 0, greedy: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 0 or (k == 0 and not greedy):
            raise ValueError(
                f"nothing to measure with k={k} and greedy={greedy}; set eval.k above 0 or eval.greedy=true"
            )
        self.k, self.greedy = k, greedy
        for name in self.COLUMNS:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        index: Int[Tensor, " prompt"],
        extracted: Int[Tensor, " prompt"],
        finished: Int[Tensor, " prompt"],
        length: Float[Tensor, " prompt"],
        greedy_correct: Bool[Tensor, " prompt"] | None = None,
        sampled: Int[Tensor, " prompt"] | None = None,
        correct: Int[Tensor, " prompt"] | None = None,
        majority_correct: Bool[Tensor, " prompt"] | None = None,
    ) -> None:
        """Add prompts: their `index` in the data set (below 2^24), and what became of their responses.

        `extracted` and `finished` count the responses with an answer and with an end token, `length` is their mean
        number of tokens: of the sampled responses, or of the greedy one where none are sampled. `correct` counts among
        `sampled`. Raises ValueError when a column that the metric was built for is missing.
        """
        rows = {
            "index": index,
            "greedy_correct": greedy_correct,
            "sampled": sampled,
            "correct": correct,
            "majority_correct": majority_correct,
            "extracted": extracted,
            "finished": finished,
            "length": length,
        }
        needed = ["greedy_correct"] * self.greedy + ["sampled", "correct", "majority_correct"] * (self.k > 0)
        if missing := [name for name in needed if rows[name] is None]:
            raise ValueError(f"no {', '.join(missing)} given, which k={self.k} and greedy={self.greedy} need")
        for name, column in rows.items():
            column = torch.zeros_like(index) if column is None else column
            getattr(self, name).append(column.to(self.device, self.dtype))

    def compute(self) -> dict[str, Tensor]:
        """Means over prompts, all in [0, 1] but `mean_length` (tokens) and `n`, the number of prompts."""
        values = self._per_prompt()
        means = {name: value.mean() for name, value in values.items()}
        means["n"] = torch.tensor(len(values["mean_length"]))
        return {name: mean.to(self.device, self.dtype) for name, mean in means.items()}

    def intervals(self, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Bootstrap interval over prompts of each mean in `compute`. Every process must call it: rows are gathered."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            values = self._per_prompt()
        return {name: bootstrap_interval(value, seed, resamples, level) for name, value in values.items()}

    def _per_prompt(self) -> dict[str, Tensor]:
        rows = self._rows()
        values = {"greedy": rows["greedy_correct"]} if self.greedy else {}
        if self.k > 0:
            values["sampled"] = rows["correct"] / rows["sampled"]
            values[f"pass@{self.k}"] = pass_at_k(rows["sampled"].long(), rows["correct"].long(), self.k)
            values[f"maj@{self.k}"] = rows["majority_correct"]
        responses = rows["sampled"] if self.k > 0 else torch.ones_like(rows["sampled"])
        values["format_rate"] = rows["extracted"] / responses
        values["unfinished_rate"] = 1 - rows["finished"] / responses
        values["mean_length"] = rows["length"]
        return values

    def _rows(self) -> dict[str, Tensor]:
        # on the CPU, because not every accelerator has the float64 that keeps the means independent of the order
        rows = {name: dim_zero_cat(getattr(self, name)).cpu().double() for name in self.COLUMNS}
        index, order = rows["index"].sort(stable=True)
        first = torch.cat([torch.tensor([True]), index[1:] != index[:-1]])
        return {name: column[order[first]] for name, column in rows.items()}
