"""A network in a folder: config.json and model.safetensors, whole or not at all."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Any = None) -> None:
    """Write config, tensors and the tokenizer's files; while this is going on the folder has no config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").unlink(missing_ok=True)
        for file in beside.iterdir():
            file.chmod(0o644)  # safetensors makes private files, an export is for the colleagues too
            file.replace(folder / file.name)
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (beside / "config.json").replace(folder / "config.json")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder. Raises FileNotFoundError or ValueError when they are not there, pickled or damaged."""
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        pickled = "only pickled weights, which are not read" if any(folder.glob("*.bin")) else "no weights"
        raise FileNotFoundError(f"{folder} has {pickled}: save the model as safetensors (save_pretrained does)")
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): fetch or save it again") from error
    return tensors
