"""The loss of a language model's head, without holding the logits of all tokens at once."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def logits(
    hidden: Float[Tensor, "... width"], weight: Float[Tensor, "vocabulary width"], softcap: float | None = None
) -> Float[Tensor, "... vocabulary"]:
    """Logits in float32; with `softcap` they are softcap * tanh(logits / softcap) (arXiv 2408.00118, section 2)."""
    values = F.linear(hidden, weight).float()
    return values if softcap is None else softcap * torch.tanh(values / softcap)


def nll(
    hidden: Float[Tensor, "token width"],
    weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, " token"],
    chunk: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, " token"]:
    """-log p(target) of each token (nats, float32).

    With `chunk` only so many tokens have their logits in memory: each chunk's are computed again in the backward pass,
    which costs one more product of the head (9 % of the FLOPs of GPT-2 small) for 1 / chunks of the memory.
    """
    if chunk is None or chunk >= len(targets):
        return _nll(hidden, weight, targets, softcap)
    pairs = zip(hidden.split(chunk), targets.split(chunk))
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(_nll, part, weight, target, softcap, **options) for part, target in pairs])


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    return F.cross_entropy(logits(hidden, weight, softcap), targets, reduction="none")
