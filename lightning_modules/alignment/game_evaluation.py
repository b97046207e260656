"""Evaluation of a game: the policy's answers against those of the policy that the run started from."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.batches import Prompt
from lightning_modules.alignment.conversation import Line, begun, to_the_end
from lightning_modules.alignment.generation import Sample
from lightning_modules.alignment.labelling import cut_off_loses
from lightning_modules.alignment.rollout import score_responses
from lightning_modules.alignment.win_rate import WinRate


class GameEvaluation:
    """What the data measures anyway (`usual`), and the win rate of `k` sampled answers under the method's oracle.

    Against as many answers of the starting policy, drawn independently; an answer that was cut off loses. Where the
    user has a script, whole conversations are compared, each side with its own replies between the user's turns.
    `kl_from_start` is KL(start || policy) per answer (nats), estimated without bias on the starting policy's answers,
    and `length_growth` the mean length of an answer over that of theirs, both of the first turn.
    """

    def __init__(self, method: Any, usual: Any, k: int) -> None:
        self.method, self.usual, self.k = method, usual, k
        self.win_rate = WinRate().to(method.device)
        self.lengths, self.lengths_before, self.kl = (MeanMetric().to(method.device) for _ in range(3))

    def answer(self, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """Answer the prompts and have the answers compared; what was said, as rows of samples.jsonl."""
        rows = self.usual.answer(prompts) or [{"id": prompt.id, "question": prompt.question} for prompt in prompts]
        drawn = self.method.answers(prompts, self.k)
        wins = self._wins(prompts, drawn)
        index = torch.tensor([self.method.trainer.datamodule.index(prompt) for prompt in prompts])
        self.win_rate.update(wins, index)
        self._drift(prompts, drawn)
        return [row | {"p_win": float(win)} for row, win in zip(rows, wins)]

    def add(self, weight: float | Tensor = 1.0, **values: Tensor) -> None:
        """Values of held-out pairs, as `ReplyEvaluation.add`."""
        self.usual.add(weight, **values)

    def results(self, stage: str) -> dict[str, float | Tensor]:
        """All of it, with the interval of the win rate; every process calls it."""
        low, high = self.win_rate.interval()
        values = {"win_rate": self.win_rate.compute(), "win_rate_low": low, "win_rate_high": high}
        growth = self.lengths.compute() / self.lengths_before.compute()
        return {**self.usual.results(stage), **values, "length_growth": growth, "kl_from_start": self.kl.compute()}

    def _wins(self, prompts: list[Prompt], drawn: list[list[Sample]]) -> Float[Tensor, " prompt"]:
        """The mean over its answers of the probability that one beats its opponent, for every prompt."""
        ours = self._to_the_end(prompts, drawn)
        theirs = [line for prompt, _ in zip(prompts, drawn) for _, line in self.method.opponents[prompt.id][: self.k]]
        ended = [torch.tensor([line.ended for line in lines]) for lines in (ours, theirs)]
        judged = [pair for pair in zip(ours, theirs) if pair[0].ended and pair[1].ended]
        known = self.method.judging.prefer(
            [one.start for one, _ in judged], [one.text for one, _ in judged], [other.text for _, other in judged]
        )
        chances = torch.full((len(ours),), 0.5).masked_scatter(ended[0] & ended[1], known)
        return cut_off_loses(chances, *ended).unflatten(0, (len(prompts), -1)).mean(1)

    def _to_the_end(self, prompts: list[Prompt], drawn: list[list[Sample]]) -> list[Line]:
        """The conversations that go on from the answers, those of a prompt together."""

        def reply(following: list[Prompt]) -> list[tuple[str, bool]]:
            return [(self.method.text(sample), sample.finished) for (sample,) in self.method.answers(following, 1)]

        lines = [
            begun(prompt, number, self.method.text(sample), sample.finished)
            for prompt, samples in zip(prompts, drawn)
            for number, sample in enumerate(samples)
        ]
        return to_the_end(lines, self.method.trainer.datamodule, reply)

    def _drift(self, prompts: list[Prompt], drawn: list[list[Sample]]) -> None:
        before = [self.method.opponents[prompt.id][0][0] for prompt in prompts]
        now = score_responses(self.method.answering, [(t.prompt_ids, t.response_ids) for t in before])
        for trajectory, log_probs, samples in zip(before, now, drawn):
            self.kl.update(sum(trajectory.lp_ref) - sum(log_probs))
            self.lengths_before.update(float(len(trajectory.response_ids)))
            self.lengths.update(sum(len(sample.ids) for sample in samples) / len(samples))
