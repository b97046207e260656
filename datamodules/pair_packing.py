"""Pairs without padding: the prompt of a pair once, both responses behind it, several pairs in a row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from datamodules.batches import PackedPreferenceBatch, Pair
from datamodules.collation import in_rows, padded_length


class Unit(NamedTuple):
    """A pair as it lies in a row, a value per token: see `PackedPreferenceBatch`."""

    ids: list[int]
    positions: list[int]
    branch: list[int]
    learned: list[bool]
    lp_ref: list[float]


def packed_preference_batch(
    pairs: Sequence[Pair], pad: int, token_share: float, multiple: int, room: int
) -> PackedPreferenceBatch:
    """What `preference_batch` says of the pairs, in rows of up to `room` tokens (or as the longest pair needs)."""
    units = [_unit(number, pair) for number, pair in enumerate(pairs)]
    rows = in_rows(units, lambda unit: len(unit.ids), room)
    width = padded_length(max(sum(len(unit.ids) for unit in row) for row in rows), multiple)
    columns = {}
    for name, filling in zip(Unit._fields, (pad, 0, -1, False, 0.0)):
        values = [[value for unit in row for value in getattr(unit, name)] for row in rows]
        columns[name] = torch.tensor([row + [filling] * (width - len(row)) for row in values])
    batch = PackedPreferenceBatch(
        ids=columns["ids"],
        mask=columns["learned"][:, :-1],
        positions=columns["positions"],
        branch=columns["branch"],
        label=torch.tensor([pair.label for pair in pairs], dtype=torch.float32),
        token_share=torch.tensor(token_share, dtype=torch.float32),
    )
    if all(pair.lp_ref is not None for pair in pairs):
        batch["lp_ref"] = columns["lp_ref"][:, :-1]
    if all(pair.value is not None for pair in pairs):
        batch["value"] = torch.tensor([pair.value for pair in pairs], dtype=torch.float32)
    return batch


def _unit(number: int, pair: Pair) -> Unit:
    shared, last = pair.prompt_ids[:-1], pair.prompt_ids[-1:]
    ids, positions = list(shared), list(range(len(shared)))
    branch, learned, lp_ref = [3 * number] * len(shared), [False] * len(shared), [0.0] * len(shared)
    for side, response in enumerate(pair.responses):
        known = [0.0] * len(response) if pair.lp_ref is None else pair.lp_ref[side]
        ids += last + response
        positions += range(len(shared), len(shared) + 1 + len(response))
        branch += [3 * number + 1 + side] * (1 + len(response))
        # the last token of a response predicts nothing
        learned += [True] * len(response) + [False]
        lp_ref += [*known, 0.0]
    return Unit(ids, positions, branch, learned, lp_ref)
