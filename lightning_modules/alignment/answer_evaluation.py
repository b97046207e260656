"""Evaluation where answers can be checked: every problem is answered, and what was said is scored."""

from typing import Any

import torch
from torch import Tensor

from datamodules.batches import Prompt
from lightning_modules.alignment.accuracy import AnswerAccuracy, maj_at_k
from lightning_modules.alignment.generation import Sample


class AnswerEvaluation:
    """Accuracy of a greedy answer and of `k` sampled ones to every problem, by the datamodule's `scorer`."""

    def __init__(self, method: Any, k: int) -> None:
        self.method, self.k = method, k
        self.scorer, self.device = method.scorer, method.device
        self.accuracy = AnswerAccuracy(k=k, greedy=True).to(method.device)

    def answer(self, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """Answer the problems and score them; what was said, as rows of samples.jsonl."""
        best = self.method.answers(prompts, 1, greedy=True)
        drawn = self.method.answers(prompts, self.k) if self.k else [[] for _ in prompts]
        return [self._score(prompt, first[0], others) for prompt, first, others in zip(prompts, best, drawn)]

    def results(self, stage: str) -> dict[str, float | Tensor]:
        """Means over problems, with intervals in the test; every process calls it."""
        values = dict(self.accuracy.compute())
        for name, (low, high) in self.accuracy.intervals().items() if stage == "test" else ():
            values |= {f"{name}_low": low, f"{name}_high": high}
        return values

    def _score(self, prompt: Prompt, greedy: Sample, others: list[Sample]) -> dict[str, Any]:
        texts = [self.method.text(sample) for sample in [greedy, *others]]
        scores = [self.scorer(text, prompt.gold) for text in texts]
        # a response cut off by the length limit has not answered, whatever stands in it
        right = [score.correct and sample.finished for score, sample in zip(scores, [greedy, *others])]
        counted = list(zip([greedy, *others], scores))[1:] or [(greedy, scores[0])]
        votes = [None if s.extracted is None else self.scorer.canonical(s.extracted) for s in scores[1:]]
        row = {
            "index": self.method.trainer.datamodule.index(prompt),
            "greedy_correct": right[0],
            "sampled": len(others),
            "correct": sum(right[1:]),
            "majority_correct": maj_at_k(votes, right[1:]),
            "extracted": sum(score.extracted is not None for _, score in counted),
            "finished": sum(sample.finished for sample, _ in counted),
            "length": sum(len(sample.ids) for sample, _ in counted) / len(counted),
        }
        self.accuracy.update(**{name: torch.tensor([value], device=self.device) for name, value in row.items()})
        answers = [{"response": t, "extracted": s.extracted, "correct": r} for t, s, r in zip(texts, scores, right)]
        said = {"id": prompt.id, "question": prompt.question, "gold": prompt.gold, "greedy": answers[0]}
        return said | ({"sampled": answers[1:]} if others else {})
