"""Evaluation where no answer can be checked: replies are sampled to be read, and held-out pairs are looked at."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.batches import Prompt
from lightning_modules.alignment.exploitability import Exploitability
from lightning_modules.alignment.generation import Sample
from lightning_modules.alignment.win_rate import WinRate


class ReplyEvaluation:
    """Means over held-out pairs, and in the test `k` sampled replies to every held-out prompt.

    Where the data knows its true `preference` and a reply to compare with (`Prompt.gold`), `beats_data` is the mean
    probability that a sampled reply is better. Where that preference is a game, `exploitability` says how many turns
    the best response to a small policy wins above half of them, on the mean over `exploitability_prompts`: in the test,
    and for a method that plays games in validation as well.
    """

    def __init__(self, method: Any, k: int) -> None:
        self.method, self.k = method, k
        data = method.trainer.datamodule
        # every process knows the same of all prompts, also where it has none of those with a reply
        comparable = any(prompt.gold for prompt in data.test)
        self.preference = getattr(data, "preference", None) if comparable else None
        self.means: dict[str, MeanMetric] = {}
        self.lengths, self.finished = MeanMetric().to(method.device), MeanMetric().to(method.device)
        self.over_data = WinRate().to(method.device)
        self.exploitability = Exploitability(method) if k or method.labels else None

    def answer(self, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """Reply to the prompts, in the test only; what was said, as rows of samples.jsonl."""
        if self.exploitability is not None:
            self.exploitability.update(prompts)
        drawn = self.method.answers(prompts, self.k) if self.k else []
        return [self._reply(prompt, samples) for prompt, samples in zip(prompts, drawn)]

    def add(self, weight: float | Tensor = 1.0, **values: Tensor) -> None:
        """Add values of held-out pairs to the means of that name; every process adds to the same names."""
        for name, value in values.items():
            mean = self.means.setdefault(name, MeanMetric().to(self.method.device))
            mean.update(value.detach().float(), weight)

    def results(self, stage: str) -> dict[str, float | Tensor]:
        """All means, and the share won against the data with its interval; every process calls it."""
        values: dict[str, float | Tensor] = {name: mean.compute() for name, mean in self.means.items()}
        if self.k:
            values |= {"mean_length": self.lengths.compute(), "unfinished_rate": 1 - self.finished.compute()}
        if self.k and self.preference is not None:
            low, high = self.over_data.interval()
            values |= {"beats_data": self.over_data.compute(), "beats_data_low": low, "beats_data_high": high}
        if self.exploitability is not None:
            values |= self.exploitability.results()
        return values

    def _reply(self, prompt: Prompt, samples: list[Sample]) -> dict[str, Any]:
        texts = [self.method.text(sample) for sample in samples]
        for sample in samples:
            self.lengths.update(float(len(sample.ids)))
            self.finished.update(float(sample.finished))
        said = {"id": prompt.id, "question": prompt.question, "replies": texts}
        if self.preference is None or not prompt.gold:
            return said
        wins = [float(self.preference(prompt, text, prompt.gold)) for text in texts]
        index = torch.tensor([self.method.trainer.datamodule.index(prompt)])
        self.over_data.update(torch.tensor([sum(wins) / len(wins)]), index)
        return said | {"other": prompt.gold, "wins": wins}
