"""Judges in folders: the trunk as transformers loads it, the head, and what it is."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from lightning_modules.alignment.judge_heads import new_head
from lightning_modules.alignment.judges import EmbeddingJudge, Judge
from lightning_modules.alignment.pairwise_judge import PairwiseJudge
from lightning_modules.alignment.policies import pretrained
from lightning_modules.alignment.policy import Policy, folder_at_once

HEAD, ABOUT = "head.safetensors", "judge.json"  # beside the trunk


def export(about: dict[str, Any], policy: Policy, head: nn.Module | None, folder: Path) -> Path:
    """Write a judge: its trunk as transformers loads it, its head, and what it is (`Judge.about`).

    The folder is complete or absent; an earlier one is replaced. Raises RuntimeError when the weights are sharded.
    """
    with folder_at_once(folder) as temporary:
        policy.export(temporary)
        if head is not None:
            save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, temporary / HEAD)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return folder


def load(folder: str | Path) -> Judge:
    """The judge that `export` wrote, in eval mode, ready to be asked as an oracle.

    Raises FileNotFoundError where the folder holds none.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(
            f"{folder} is no export of a judge (it has no {ABOUT}): give the export/ folder of a run of model=gpm, "
            "model=bt or model=pairpm"
        )
    about, policy = json.loads((folder / ABOUT).read_text()), pretrained(str(folder))
    if "head" in about:
        judge: Judge = EmbeddingJudge(policy, partial(new_head, about["head"]), about["tau"])
        judge.head.load_state_dict(load_file(folder / HEAD))
    else:
        judge = PairwiseJudge(policy)
    return judge.requires_grad_(False).eval()
