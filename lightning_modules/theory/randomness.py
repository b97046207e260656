"""Random numbers of simulations side by side: those of a copy depend on the seed, the copy and the round alone.

Philox counts (Salmon et al., SC 2011): its key is the seed and the copy, its counter says where in the stream one is.
So a copy draws the same numbers in any company, and from any round on without those before it.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

WORDS = 4  # numbers that a count of the counter gives


def uniforms(seed: int, copies: int, first: int, rounds: int, each: int) -> Float[Tensor, "round copy number"]:
    """At least `each` numbers in (0, 1) for every copy and every round from `first` on."""
    counts = -(-each // WORDS)
    made = np.empty((rounds, copies, counts * WORDS))
    for copy, draw in enumerate(streams(seed, copies, [first * counts, 0, 0, 0])):
        made[:, copy] = draw.random((rounds, counts * WORDS))
    return torch.from_numpy(made).add_(2.0**-54)  # never 0, where the normal quantile is infinite


def normal(chance: Float[Tensor, "*numbers"]) -> Float[Tensor, "*numbers"]:
    """The standard normal numbers of these quantiles; SciPy's, because the last bit of torch's depends on the place."""
    return torch.from_numpy(ndtri(chance.numpy()))


def streams(seed: int, copies: int, counter: list[int]) -> Iterator[np.random.Generator]:
    """The generator of every copy in turn, at a place of its stream; each is to be used up before the next."""
    bits = np.random.Philox(key=[seed, 0], counter=counter)
    draw, state = np.random.Generator(bits), bits.state
    for copy in range(copies):
        state["state"]["key"] = np.array([seed, copy], dtype=np.uint64)
        bits.state = state
        yield draw


def sampled(log_policy: Float[Tensor, "*batch action"], chance: Float[Tensor, "*batch 1"]) -> Tensor:
    """The action at which the distribution function passes `chance`, in [0, actions - 1] whatever the rounding."""
    return (log_policy.exp().cumsum(-1)[..., :-1] < chance).sum(-1, keepdim=True)
