"""One prompt with a few answers, their rewards known: the smallest problem of preference optimisation."""

import hashlib

import numpy as np
import torch

from datamodules.rounds import Rounds


class Bandit(Rounds):
    """`answers` with uniform rewards in [0, `scale`], the best first, and a random policy to start from.

    Drawn from NumPy's default generator at `problem`: rewards, then the logits of the policy, standard normal.
    """

    def __init__(
        self, name: str, answers: int, scale: float, problem: int, rounds: int, chunk: int, limit: int | None
    ) -> None:
        if answers < 2 or not scale > 0:
            raise ValueError(f"data.answers={answers} must be at least 2 and data.scale={scale} positive")
        draw = np.random.default_rng(problem)
        self.reward = torch.from_numpy(scale * np.sort(draw.uniform(0, 1, answers))[::-1].copy())
        self.log_reference = torch.from_numpy(draw.normal(size=answers)).log_softmax(-1)
        digest = hashlib.sha256(self.reward.numpy().tobytes() + self.log_reference.numpy().tobytes()).hexdigest()
        super().__init__(name, f"problem {problem} of {answers} answers", digest, rounds, chunk, limit)
