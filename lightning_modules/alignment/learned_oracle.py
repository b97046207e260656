"""Judges that were trained in a run of their own (model=gpm, bt or pairpm) as oracles of a game."""

from collections.abc import Iterator
from typing import Any

import torch

from datamodules.batches import Prompt
from lightning_modules.alignment.judge_export import load
from lightning_modules.alignment.oracle import Oracle


class Learned(Oracle):
    """The judge in `export`, the export folder of its run; its log-odds are antisymmetric by construction.

    Every answer is read once however often it is compared: the comparisons of a prompt are taken from one table.
    """

    def __init__(self, export: str) -> None:
        self.judge = load(export)
        self.kind = self.judge.identity

    @property
    def identity(self) -> dict[str, Any]:
        return {"oracle": "learned", **self.kind}

    def to(self, device: torch.device) -> None:
        self.judge.to(device)

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt.id, []).append(row)
        for together in rows.values():
            texts = list(dict.fromkeys(text for row in together for text in (first[row], second[row])))
            table = self.judge.table(prompts[together[0]], texts)
            for row in together:
                yield row, float(table[texts.index(first[row]), texts.index(second[row])])
