"""GPT-2 checkpoints of Hugging Face transformers, read and written (safetensors only)."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules import weights
from lightning_modules.language.gpt2 import GPT2

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
# what a config.json leaves out has transformers' value
DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers keeps them as [in, out]


def load(source: str | Path, dropout: float = 0.0, loss_chunk: int | None = None) -> GPT2:
    """The network of a checkpoint folder, or of a model on the hub by its name.

    The vocabulary is not padded: trained logits are far below 0, so padded rows of zeros would take the probability.
    Raises FileNotFoundError, ConnectionError or ValueError when it is not there or is no GPT-2 in safetensors.
    """
    folder = _folder(str(source))
    config = _config(folder / "config.json")
    network = GPT2(
        config["vocab_size"],
        context=config["n_positions"],
        layers=config["n_layer"],
        heads=config["n_head"],
        width=config["n_embd"],
        gelu=ACTIVATIONS[config["activation_function"]],
        scale_by_layer=config["scale_attn_by_inverse_layer_idx"],
        tied=config["tie_word_embeddings"],
        pad_vocabulary_to=1,
        dropout=dropout,
        loss_chunk=loss_chunk,
    )
    _fill(network, _tensors(folder), folder)
    return network


def save(network: GPT2, folder: str | Path, tokenizer: Any = None, writes: bool = True) -> None:
    """Write config.json and model.safetensors, and the tokenizer's files, as transformers' Auto classes load them.

    Padded rows of the vocabulary are left out; biases that the network does not have are zeros. While it is written the
    folder has no config.json, so that an interrupted one is refused. Where FSDP2 sharded the network every process
    calls this, with `writes` on one of them. Raises ValueError for a network that transformers' GPT-2 cannot express.
    """
    config, tensors = _described(network, tokenizer), _named_as_theirs(network)
    if not writes:
        return
    weights.write(folder, config, tensors, tokenizer)


def _folder(source: str) -> Path:
    """The checkpoint's folder; a name is looked up on the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir() or source.startswith((".", "/", "~")):
        return folder
    try:
        with suppress(LocalEntryNotFoundError):
            return _downloaded(source, local_files_only=True)
        # asked once with a short limit: without a network the download would be tried again for half a minute
        HfApi().model_info(source, timeout=5)
        return _downloaded(source)
    except Exception as error:
        raise ConnectionError(
            f"{source!r} is no folder here, and the Hugging Face hub gives no GPT-2 of that name "
            f"({str(error).strip().splitlines()[0]}): check the name, or give the folder of a checkpoint"
        ) from error


def _downloaded(name: str, **options: bool) -> Path:
    files = [hf_hub_download(name, file, **options) for file in ("config.json", "model.safetensors")]
    return Path(files[0]).parent


def _config(file: Path) -> dict[str, Any]:
    """What the file says, completed; ValueError where it is another architecture than `GPT2`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give the folder of a GPT-2 that save_pretrained wrote")
    try:
        config = DEFAULTS | json.loads(file.read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no JSON object ({error}): save the checkpoint again") from error
    possible = {
        "model_type": ["gpt2"],
        "activation_function": list(ACTIVATIONS),
        "n_inner": [None, 4 * config["n_embd"]],
        "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True],
        "add_cross_attention": [False],
    }
    for key, values in possible.items():
        if config.get(key) not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{file} says {key}={config.get(key)!r}, which this network cannot be: it takes {allowed}")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint by their names in transformers, without the leading `transformer.`."""
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.read(folder).items()}


@torch.no_grad()
def _fill(network: GPT2, tensors: dict[str, Tensor], folder: Path) -> None:
    for name, ours in network.named_parameters():
        theirs = name.replace("blocks.", "h.")
        if theirs not in tensors:
            raise ValueError(f"{folder} has no tensor {theirs}: it is not the whole of a GPT-2 language model")
        tensor = tensors[theirs].T if theirs.endswith(TRANSPOSED) else tensors[theirs]
        if tensor.shape != ours.shape:
            raise ValueError(
                f"{folder}: {theirs} has the shape {tuple(tensors[theirs].shape)}, which does not fit config.json"
            )
        ours.copy_(tensor)


def _described(network: GPT2, tokenizer: Any) -> dict[str, Any]:
    """The network as config.json; ValueError for what transformers' GPT-2 has no option for."""
    chosen = {**network.choices, "qk_norm": network.qk_norm, "softcap": network.softcap}
    expressible = {"norm": "layer", "mlp": "gelu", "position": "learned", "qk_norm": False, "softcap": None}
    for name, only in expressible.items():
        if chosen[name] != only:
            raise ValueError(
                f"a network with {name}={chosen[name]} cannot be written for transformers, whose GPT-2 has only "
                f"{name}={only}: keep its checkpoint"
            )
    return {
        **DEFAULTS,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "vocab_size": network.vocab_size,
        "n_positions": network.context,
        "n_embd": network.width,
        "n_layer": len(network.blocks),
        "n_head": network.heads,
        "activation_function": {"tanh": "gelu_new", "erf": "gelu"}[chosen["gelu"]],
        "scale_attn_by_inverse_layer_idx": network.scale_by_layer,
        "tie_word_embeddings": network.lm_head is None,
        **{f"{part}_pdrop": network.dropout for part in ("embd", "attn", "resid")},
        **{f"{end}_token_id": getattr(tokenizer, f"{end}_token_id", None) for end in ("bos", "eos")},
    }


def _named_as_theirs(network: GPT2) -> dict[str, Tensor]:
    """The parameters, whole and on the CPU, as transformers names and lays them out."""
    tensors = {}
    for name, parameter in network.named_parameters():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        tensor = tensor.detach().float().cpu()
        theirs = name.replace("blocks.", "h.")
        if theirs.startswith(("h.", "ln_f.")):
            tensors.setdefault(theirs.replace(".weight", ".bias"), torch.zeros(len(tensor)))
        if name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[: network.vocab_size]
        tensors[theirs] = tensor.T.contiguous() if theirs.endswith(TRANSPOSED) else tensor.clone()
    return {name if name.startswith("lm_head") else f"transformer.{name}": tensor for name, tensor in tensors.items()}
