"""Heads of judges by embeddings: what a preference model reads at the end of an answer and of its prompt."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.alignment.preference_embedding import scalar_embedding

GATE_SCALES = ("sum1", "mean1")


class Embedded(NamedTuple):
    """Answers as vectors of 2k numbers, and the weight lambda of each plane at their prompt; float32."""

    vectors: Float[Tensor, "batch answers d"]
    scale: Float[Tensor, "batch k"] | None


class Gate(nn.Module):
    """lambda(x) >= 0 from the hidden state of the prompt's last token (section 4.2): softmax over the planes.

    `scale` is sum1, the released models' and the default, or mean1: times k, so that the weights have mean 1.
    """

    def __init__(self, width: int, planes: int, scale: str = "sum1") -> None:
        super().__init__()
        if scale not in GATE_SCALES:
            raise ValueError(f"model.judge.head.gate_scale={scale}: there are {' and '.join(GATE_SCALES)}")
        self.linear = nn.Linear(width, planes, bias=False)
        self.total = planes if scale == "mean1" else 1

    def forward(self, prompt: Float[Tensor, "batch width"]) -> Float[Tensor, "batch k"]:
        """Weights of the planes."""
        return self.total * torch.softmax(self.linear(prompt), -1)


class EmbeddingHead(nn.Module):
    """GPM's head: an even number `dim` of coordinates at the end token, of unit length if `normalise` (section 4)."""

    def __init__(self, width: int, dim: int, normalise: bool, gate: bool, gate_scale: str = "sum1") -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"model.judge.head.dim={dim}: an embedding is made of planes, so take 2, 4, 6, ...")
        self.settings = {
            "head": "EmbeddingHead", "dim": dim, "normalise": normalise, "gate": gate, "gate_scale": gate_scale
        }  # fmt: skip
        self.linear = _projection(width, dim)
        self.normalise = normalise
        self.gate = Gate(width, dim // 2, gate_scale) if gate else None

    def forward(self, end: Float[Tensor, "batch answers width"], prompt: Float[Tensor, "batch width"]) -> Embedded:
        """From the hidden states at the end of each answer and of the prompt; always in float32."""
        with torch.autocast(end.device.type, enabled=False):
            vectors = self.linear(end.float())
            if self.normalise:
                vectors = F.normalize(vectors, dim=-1, eps=1e-12)
            return Embedded(vectors, None if self.gate is None else self.gate(prompt.float()))


class RewardHead(nn.Module):
    """Bradley-Terry's head: `dim` rewards at the end token, mixed by a gate on the prompt where there are several.

    With dim 1 it is a reward model; with more, a scalar of the same capacity as GPM's head: the control of what planes
    bring beside parameters.
    """

    def __init__(self, width: int, dim: int = 1, gate: bool = False) -> None:
        super().__init__()
        if dim < 1 or (dim > 1 and not gate):
            raise ValueError(
                f"model.judge.head.dim={dim}: one reward, or several that model.judge.head.gate=true mixes"
            )
        self.settings = {"head": "RewardHead", "dim": dim, "gate": gate}
        self.linear = _projection(width, dim)
        self.gate = Gate(width, dim) if gate else None

    def forward(self, end: Float[Tensor, "batch answers width"], prompt: Float[Tensor, "batch width"]) -> Embedded:
        """As `EmbeddingHead.forward`, with the constant coordinate that makes a score a difference of rewards."""
        with torch.autocast(end.device.type, enabled=False):
            vectors = scalar_embedding(self.linear(end.float()))
            return Embedded(vectors, None if self.gate is None else self.gate(prompt.float()))


HEADS = {head.__name__: head for head in (EmbeddingHead, RewardHead)}


def new_head(settings: dict[str, Any], width: int) -> nn.Module:
    """A head by its `settings`, untrained."""
    return HEADS[settings["head"]](width, **{name: value for name, value in settings.items() if name != "head"})


def _projection(width: int, dim: int) -> nn.Linear:
    """Without bias, N(0, 1 / (width + 1)) in standard deviation, as the released code."""
    linear = nn.Linear(width, dim, bias=False)
    nn.init.normal_(linear.weight, std=1 / (width + 1))
    return linear
