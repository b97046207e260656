"""GPT-2 (Radford et al. 2019), with the later choices of block that its successors are compared by."""

import math
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_modules.language.attention import MultiHeadAttention
from lightning_modules.language.decoder import Block, Decoder

ACTIVATIONS = {
    "erf": F.gelu,
    "tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "swiglu": F.silu,
}
NORMS = {
    "layer": lambda width, bias: nn.LayerNorm(width, bias=bias),
    "rms": lambda width, bias: nn.RMSNorm(width, elementwise_affine=False),
}
CHOICES = {
    "gelu": ("erf", "tanh"),
    "norm": tuple(NORMS),
    "mlp": ("gelu", "relu2", "swiglu"),
    "position": ("learned", "rotary"),
}


class MLP(nn.Module):
    """Linear, activation, linear: hidden width 4 C; GELU by erf or tanh, or ReLU^2 (arXiv 2109.08668).

    "swiglu" multiplies the activated half with another (arXiv 2002.05202, eq. 6) at hidden width 8 C / 3, which leaves
    the number of parameters as it was. `hidden` is another hidden width.
    """

    def __init__(self, width: int, activation: str, bias: bool, dropout: float, hidden: int | None = None) -> None:
        super().__init__()
        gated = activation == "swiglu"
        hidden = hidden or (8 * width // 3 if gated else 4 * width)
        self.activation, self.dropout = activation, dropout
        self.c_fc = nn.Linear(width, hidden, bias)
        self.c_gate = nn.Linear(width, hidden, bias) if gated else None
        self.c_proj = nn.Linear(hidden, width, bias)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        hidden = ACTIVATIONS[self.activation](self.c_fc(x))
        hidden = hidden if self.c_gate is None else hidden * self.c_gate(x)
        return F.dropout(self.c_proj(hidden), self.dropout, self.training)


class GPT2(Decoder):
    """GPT-2: small is layers=12, heads=12, width=768, medium 24/16/1024, large 36/20/1280, xl 48/25/1600.

    `gelu` is "erf" (nanoGPT) or "tanh" (OpenAI's weights). `scale_by_layer` divides the scores of layer l (from 1) by l
    too, as the published MARS runs do. `loss_chunk` is the number of tokens whose logits are in memory at once. Beyond
    GPT-2: `norm="rms"` has no parameters, `mlp="relu2"` or `"swiglu"`, `position="rotary"` in the place of the learned
    embedding, `qk_norm`, `softcap` of the logits, `zero_init` of what writes to the residual stream.
    Raises ValueError when the width does not fit the heads, and for a dropout outside of [0, 1).
    """

    loaded_by = "AutoModelForCausalLM.from_pretrained"

    def __init__(
        self,
        vocab_size: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        bias: bool = True,
        dropout: float = 0.0,
        gelu: str = "erf",
        scale_by_layer: bool = False,
        tied: bool = True,
        pad_vocabulary_to: int = 64,
        loss_chunk: int | None = None,
        norm: str = "layer",
        mlp: str = "gelu",
        position: str = "learned",
        qk_norm: bool = False,
        softcap: float | None = None,
        zero_init: bool = False,
    ) -> None:
        choices = {"gelu": gelu, "norm": norm, "mlp": mlp, "position": position}
        sizes = {"vocab_size": vocab_size, "context": context, "layers": layers, "heads": heads, "width": width}
        _check(sizes | {"pad_vocabulary_to": pad_vocabulary_to}, choices)
        activation, rotary = (gelu if mlp == "gelu" else mlp), position == "rotary"
        blocks = [
            Block(
                NORMS[norm](width, bias),
                MultiHeadAttention(width, heads, layer, bias, dropout, scale_by_layer, rotary, qk_norm),
                NORMS[norm](width, bias),
                MLP(width, activation, bias, dropout),
            )
            for layer in range(layers)
        ]
        options = {"dropout": dropout, "tied": tied, "pad_vocabulary_to": pad_vocabulary_to, "loss_chunk": loss_chunk}
        super().__init__(
            vocab_size, context, width, blocks, NORMS[norm](width, bias), not rotary, softcap=softcap, **options
        )
        self.heads, self.scale_by_layer, self.qk_norm, self.choices = heads, scale_by_layer, qk_norm, choices
        self.initialise(zero_init)

    def initialise(self, zero_init: bool = False) -> None:
        """Weights N(0, 0.02^2), those that write to the residual stream N(0, 0.02^2 / 2L) or 0; biases 0, gains 1."""
        residual = 0.0 if zero_init else 0.02 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=residual if name.endswith("c_proj.weight") else 0.02)
            else:
                nn.init.constant_(parameter, float(name.endswith("weight")))

    def export(self, folder: Path) -> None:
        """Write it as transformers' Auto classes load it; see `hf_gpt2.save`."""
        from lightning_modules.language import hf_gpt2  # which imports this module

        hf_gpt2.save(self, folder)


def _check(sizes: dict[str, int], choices: dict[str, str]) -> None:
    """Raise ValueError for a size below 1 and for a choice that there is not."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} is no size: take at least 1")
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is none of {', '.join(CHOICES[name])}")
