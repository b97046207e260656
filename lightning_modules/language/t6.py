"""T6 (arXiv 2501.06425): a decoder like Llama's, whose attention is a choice."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from kernels.tpa.dispatch import Impl
from lightning_modules import weights
from lightning_modules.language import tensor_product as tpa
from lightning_modules.language.attention import Attention
from lightning_modules.language.decoder import Block, Decoder
from lightning_modules.language.gpt2 import MLP
from lightning_modules.language.grouped import GroupedQueryAttention
from lightning_modules.language.latent import LatentAttention
from lightning_modules.language.rotary import rotate

TENSOR_PRODUCTS: dict[str, type[tpa.TensorProductAttention]] = {
    "tpa": tpa.TensorProductAttention,
    "tpa_kvonly": tpa.KeyValueAttention,
    "tpa_noncontextual_a": tpa.ConstantHeadFactors,
    "tpa_noncontextual_b": tpa.ConstantTokenFactors,
    "tpa_shared_b": tpa.SharedTokenFactors,
    "tpa_third_order": tpa.ThirdOrderAttention,
}
GROUPED: dict[str, Callable[[int, int], int]] = {  # groups, of heads and the key `groups`
    "mha": lambda heads, groups: heads,
    "mqa": lambda heads, groups: 1,
    "gqa": lambda heads, groups: groups,
}
ATTENTIONS = (*GROUPED, "mla", *TENSOR_PRODUCTS)


class T6(Decoder):
    """Root mean square norms, rotary positions, SwiGLU, no biases, tied head; `attention` is one of `ATTENTIONS`.

    `heads` is a number, or one for each attention, so that a change of attention can keep the number of parameters.
    Of the sizes of attention each kind takes its own: `groups` (gqa), `ranks` of queries, keys and values (tpa),
    `orders` d_b and d_c (tpa_third_order), `latents` of queries and of keys and values with `rotary_width` (mla).
    `rope_sign` -1 is that of the authors' code, +1 Llama's; `rope_table` is the precision of cosines and sines, float32
    or bfloat16 as in that code. `init` of the factors is "official" or "xavier". `hidden` of the SwiGLU is 8 width / 3
    by default. Norms have no gains and the precision's eps, but with `norm_gain` and `norm_eps`. `impl` is which way
    attentions with factors go: "auto" takes their Triton kernels on a GPU, "torch" never, "triton" or not at all.
    Raises ValueError for what is no size, and for sizes that do not fit each other.
    """

    loaded_by = "lightning_modules.language.t6.T6.load"

    def __init__(
        self,
        vocab_size: int,
        context: int,
        layers: int,
        width: int,
        heads: int | Mapping[str, int],
        attention: str = "tpa",
        head_width: int = 64,
        groups: int = 2,
        ranks: Sequence[int] = (6, 2, 2),
        orders: Sequence[int] = (16, 4),
        latents: Sequence[int] = (512, 256),
        rotary_width: int = 32,
        rope_sign: int = -1,
        rope_base: float = 10_000.0,
        rope_table: str = "float32",
        init: str = "official",
        hidden: int | None = None,
        norm_gain: bool = False,
        norm_eps: float | None = None,
        tied: bool = True,
        pad_vocabulary_to: int = 64,
        loss_chunk: int | None = None,
        impl: str = "auto",
    ) -> None:
        config = {
            "vocab_size": vocab_size, "context": context, "layers": layers, "width": width,
            "heads": heads if isinstance(heads, int) else heads.get(attention), "attention": attention,
            "head_width": head_width, "groups": groups, "ranks": list(ranks), "orders": list(orders),
            "latents": list(latents), "rotary_width": rotary_width, "rope_sign": rope_sign, "rope_base": rope_base,
            "rope_table": rope_table, "init": init, "hidden": hidden, "norm_gain": norm_gain, "norm_eps": norm_eps,
            "tied": tied, "pad_vocabulary_to": pad_vocabulary_to,
        }  # fmt: skip
        _check({**config, "impl": impl})

        def norm() -> nn.Module:
            return nn.RMSNorm(width, norm_eps, elementwise_affine=norm_gain)

        blocks = [
            Block(norm(), _attention(config, impl), norm(), MLP(width, "swiglu", False, 0.0, hidden))
            for _ in range(layers)
        ]
        super().__init__(
            vocab_size, context, width, blocks, norm(), False, 0.0, tied, pad_vocabulary_to, loss_chunk=loss_chunk
        )
        self.config = config
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """What writes to the residual stream is 0, embedding and head are U(-1, 1) / sqrt(width), as in T6's code."""
        for table in (self.wte, self.lm_head):
            if table is not None:
                nn.init.uniform_(table.weight, -1 / math.sqrt(self.width), 1 / math.sqrt(self.width))
        for block in self.blocks:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

    def export(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which `load` reads; the network is not sharded."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.named_parameters()}
        weights.write(folder, {"model_type": "t6", **self.config}, tensors)

    @classmethod
    def load(cls, folder: str | Path, loss_chunk: int | None = None) -> "T6":
        """The network of a folder that `export` wrote.

        Raises FileNotFoundError or ValueError when it is not there or is no T6.
        """
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: give a folder that T6.export wrote")
        config = _read(file)
        try:
            network = cls(**config, loss_chunk=loss_chunk)
            network.load_state_dict(weights.read(file.parent))
        except (TypeError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{folder}: config.json and model.safetensors do not fit: {said}; export again") from error
        return network


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        if config.pop("model_type", None) == "t6":
            return config
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no JSON object ({error}): export the network again") from error
    raise ValueError(f"{file} is not of a T6, whose model_type is t6: give a folder that T6.export wrote")


def _attention(config: dict[str, Any], impl: str) -> Attention:
    kind, width, heads, head_width = (config[name] for name in ("attention", "width", "heads", "head_width"))
    table = {"float32": None, "bfloat16": torch.bfloat16}[config["rope_table"]]
    turn = partial(rotate, base=config["rope_base"], sign=config["rope_sign"], table_dtype=table)
    if kind in GROUPED:
        return GroupedQueryAttention(width, heads, head_width, GROUPED[kind](heads, config["groups"]), turn)
    if kind == "mla":
        return LatentAttention(width, heads, head_width, tuple(config["latents"]), config["rotary_width"], turn)
    orders = {"orders": tuple(config["orders"])} if kind == "tpa_third_order" else {}
    options = {"turn": turn, "init": config["init"], "impl": impl, **orders}
    return TENSOR_PRODUCTS[kind](width, heads, head_width, tuple(config["ranks"]), **options)


def _check(config: dict[str, Any]) -> None:
    """Raise ValueError for sizes below 1 and for choices that there are not; each attention checks its own sizes."""
    choices = {"attention": ATTENTIONS, "rope_sign": (-1, 1), "rope_table": ("float32", "bfloat16")}
    choices["impl"] = get_args(Impl)
    for name, allowed in choices.items():
        if config[name] not in allowed:
            raise ValueError(f"{name}={config[name]!r} is none of {', '.join(map(str, allowed))}")
    if config["heads"] is None:
        raise ValueError(f"heads has no number for attention={config['attention']}: add one")
    sizes = ("vocab_size", "context", "layers", "width", "heads", "head_width", "pad_vocabulary_to", "hidden")
    for name in sizes:
        if config[name] is not None and config[name] < 1:
            raise ValueError(f"{name}={config[name]} is no size: take at least 1")
