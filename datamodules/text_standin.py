"""Text for when none is given, and streams of tokens whose best possible loss is known."""

import sysconfig
from bisect import bisect
from functools import cached_property
from pathlib import Path

import numpy as np


def standard_library() -> str:
    """The source of the modules at the top of Python's standard library, in order: some 4.7 MB, PSF licence."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.py to take as text: give a file as data.path")
    return "".join(file.read_text("utf-8", errors="replace") for file in files)


class MarkovChain:
    """p(x_t | x_{t-2} = a, x_{t-1} = b) = softmax(A[a] + B[b]), tables of N(0, scale^2), so of known entropy."""

    def __init__(self, vocab_size: int = 64, scale: float = 1.5, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        before, last = scale * generator.standard_normal((2, vocab_size, vocab_size))
        logits = before[:, None] + last[None]
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        self.vocab_size, self.transition = vocab_size, odds / odds.sum(-1, keepdims=True)  # [a, b, x]

    @cached_property
    def pairs(self) -> np.ndarray:
        """The stationary distribution of (x_{t-1}, x_t), by power iteration."""
        pairs = np.full((self.vocab_size, self.vocab_size), self.vocab_size**-2.0)
        for _ in range(1_000):
            after = np.einsum("ab,abx->bx", pairs, self.transition)
            if np.abs(after - pairs).sum() < 1e-13:
                break
            pairs = after
        return after

    @property
    def entropy_rate(self) -> float:
        """H(x_t | x_{t-2}, x_{t-1}) in nats: no model has a lower expected loss."""
        return float(-np.einsum("ab,abx,abx->", self.pairs, self.transition, np.log(self.transition)))

    def sample(self, length: int, seed: int) -> np.ndarray:
        """uint16 of shape (length,), begun in the stationary distribution."""
        generator = np.random.default_rng(seed)
        steps = self.transition.cumsum(-1).tolist()
        a, b = divmod(int(generator.choice(self.vocab_size**2, p=self.pairs.ravel())), self.vocab_size)
        drawn = [a, b]
        for uniform in generator.random(length - 2).tolist():
            a, b = b, min(bisect(steps[a][b], uniform), self.vocab_size - 1)  # a sum may end a rounding below 1
            drawn.append(b)
        return np.array(drawn, np.uint16)


def induction(sequences: int, half: int, vocab_size: int, seed: int) -> np.ndarray:
    """uint16 of shape (sequences, 2 half): a uniform random prefix and its repetition, which can be foretold."""
    prefix = np.random.default_rng(seed).integers(vocab_size, size=(sequences, half), dtype=np.uint16)
    return np.concatenate([prefix, prefix], axis=1)


def uniform(length: int, vocab_size: int, seed: int) -> np.ndarray:
    """uint16 of shape (length,): nothing can be learned, every honest loss is at least ln(vocab_size)."""
    return np.random.default_rng(seed).integers(vocab_size, size=length, dtype=np.uint16)
