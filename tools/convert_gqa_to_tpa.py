"""A Llama-like checkpoint with grouped queries as a T6 with tensor product attention, exactly.

    python -m tools.convert_gqa_to_tpa <folder or name of a Llama> -o <new folder>

Grouped-query attention is tensor product attention whose head factors are constant (arXiv 2501.06425, section 4):
R_K = R_V = groups with A_j = groups on the heads of group j, R_Q = heads with A_i = heads on head i; the token factors
are the checkpoint's own queries, keys and values. Logits are the same to rounding, and the cache keeps as many numbers.
What the new folder holds loads with `lightning_modules.language.t6.T6.load`.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM, PretrainedConfig

from lightning_modules.language.t6 import T6
from lightning_modules.language.tensor_product import ConstantHeadFactors


def convert(source: str | Path) -> T6:
    """The network of a checkpoint in safetensors, in float32.

    Raises OSError when it is not there, and ValueError when it is another architecture than T6 can be.
    """
    config = AutoConfig.from_pretrained(source)
    _check(config)
    theirs = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    network = empty(config)
    tensors = renamed(theirs.state_dict(), config)
    network.load_state_dict(tensors | constants(config))
    return network


def empty(config: PretrainedConfig) -> T6:
    """A T6 of these sizes."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return T6(
        config.vocab_size,
        context=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        attention="tpa_noncontextual_a",
        head_width=config.head_dim,
        ranks=(heads, groups, groups),
        rope_sign=1,
        rope_base=config.rope_parameters["rope_theta"],
        hidden=config.intermediate_size,
        norm_gain=True,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        pad_vocabulary_to=1,
    )


def renamed(theirs: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """The checkpoint's tensors under T6's names."""
    tensors = {"wte.weight": theirs["model.embed_tokens.weight"], "ln_f.weight": theirs["model.norm.weight"]}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = theirs["lm_head.weight"]
    names = {
        "ln_1": "input_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.gate_proj",
        "mlp.c_gate": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        before, of_theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        tensors |= {f"{before}{our}.weight": theirs[f"{of_theirs}{their}.weight"] for our, their in names.items()}
        factors = [theirs[f"{of_theirs}self_attn.{x}_proj.weight"] for x in "qkv"]
        tensors[f"{before}attn.c_attn.weight"] = torch.cat(factors)
    return tensors


def constants(config: PretrainedConfig) -> dict[str, Tensor]:
    """The head factors of all layers: which heads read which query, key and value."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    group = torch.arange(heads) // (heads // groups)
    of_keys = groups * F.one_hot(group, groups).T.float()
    factors = {"a_q": heads * torch.eye(heads), "a_k": of_keys, "a_v": of_keys}
    layers = range(config.num_hidden_layers)
    return {f"blocks.{n}.attn.constants.{name}": factors[name] for n in layers for name in ConstantHeadFactors.constant}


def _check(config: PretrainedConfig) -> None:
    """ValueError for what T6 has no option for."""
    found = {
        "model_type": (config.model_type, "llama"),
        "hidden_act": (getattr(config, "hidden_act", "silu"), "silu"),
        "attention_bias": (getattr(config, "attention_bias", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "rope_parameters.rope_type": ((getattr(config, "rope_parameters", None) or {}).get("rope_type"), "default"),
    }
    for key, (value, only) in found.items():
        if value != only:
            raise ValueError(
                f"the checkpoint says {key}={value!r}, and T6 can only be {key}={only!r}: take another one"
            )


def main() -> int:
    """The command line; 1 with a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_gqa_to_tpa", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", help="folder or name on the Hugging Face hub")
    parser.add_argument("-o", "--output", required=True, type=Path, help="a new folder")
    options = parser.parse_args()
    try:
        if options.output.exists():
            raise FileExistsError(f"{options.output} is there already: give another folder as --output, or delete it")
        network = convert(options.source)
        network.export(options.output)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    kept = network.cache_bytes_per_token(torch.bfloat16)
    print(f"{options.output}: {len(network.blocks)} layers, {kept:,} bytes of bfloat16 cache per token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
