"""From sequences of tokens to the tensors of a batch: a sequence a row, right-padded, or several packed into a row."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batches import Pair, PreferenceBatch, TokenBatch, Trajectory, TrajectoryBatch

Row = tuple[list[int], list[int]]  # prompt and response
Packed = TypeVar("Packed")


def token_batch(rows: Sequence[Row], pad: int, token_share: float, multiple: int = 1) -> TokenBatch:
    """Prompt and response tokens side by side, right-padded, the responses marked."""
    ids, mask, _ = _laid_out([[row] for row in rows], pad, multiple)
    return TokenBatch(ids=ids, mask=mask, token_share=_scalar(token_share))


def packed_batch(rows: Sequence[Row], pad: int, token_share: float, multiple: int, room: int) -> TokenBatch:
    """As `token_batch`, with the sequences end to end in rows of up to `room` tokens (or as the longest one needs)."""
    ids, mask, positions = _laid_out(in_rows(rows, _length, room), pad, multiple)
    return TokenBatch(ids=ids, mask=mask, token_share=_scalar(token_share), positions=positions)


def trajectory_batch(rows: Sequence[Trajectory], pad: int, token_share: float, multiple: int = 1) -> TrajectoryBatch:
    """Trajectories right-padded; the outcome reward sits on the last response token."""
    ids, mask, _ = _laid_out([[(t.prompt_ids, t.response_ids)] for t in rows], pad, multiple)
    rewards = [_token_rewards(t) for t in rows]
    return TrajectoryBatch(
        ids=ids,
        mask=mask,
        token_share=_scalar(token_share),
        rewards=_spread(rewards, mask),
        lp_mu=_spread([t.lp_mu for t in rows], mask),
        lp_ref=_spread([t.lp_ref for t in rows], mask),
        outcome=torch.tensor([float(t.reward) for t in rows]),
        prompt_length=torch.tensor([len(t.prompt_ids) for t in rows]),
    )


def preference_batch(pairs: Sequence[Pair], pad: int, token_share: float, multiple: int = 1) -> PreferenceBatch:
    """Two rows a pair, right-padded; `lp_ref` and `value` are there when all pairs have them."""
    ids, mask, _ = _laid_out(
        [[(pair.prompt_ids, response)] for pair in pairs for response in pair.responses], pad, multiple
    )
    batch = PreferenceBatch(
        ids=ids.unflatten(0, (-1, 2)),
        mask=mask.unflatten(0, (-1, 2)),
        label=torch.tensor([pair.label for pair in pairs], dtype=torch.float32),
        token_share=_scalar(token_share),
    )
    if all(pair.lp_ref is not None for pair in pairs):
        batch["lp_ref"] = _spread([lp for pair in pairs for lp in pair.lp_ref], mask).unflatten(0, (-1, 2))
    if all(pair.value is not None for pair in pairs):
        batch["value"] = torch.tensor([pair.value for pair in pairs], dtype=torch.float32)
    return batch


def padded_length(tokens: int, multiple: int) -> int:
    """Length of a row for `tokens` tokens: all but the last one, which a policy only predicts, make a multiple."""
    return 1 + -(-(tokens - 1) // multiple) * multiple


def in_rows(items: Sequence[Packed], length: Callable[[Packed], int], room: int) -> list[list[Packed]]:
    """Few groups that are no longer than `room`: each item, longest first, into the first group that takes it."""
    groups: list[list[Packed]] = []
    filled: list[int] = []
    for item in sorted(items, key=length, reverse=True):
        place = next((i for i, tokens in enumerate(filled) if tokens + length(item) <= room), len(groups))
        if place == len(groups):
            groups.append([])
            filled.append(0)
        groups[place].append(item)
        filled[place] += length(item)
    return groups


def _laid_out(
    groups: Sequence[Sequence[Row]], pad: int, multiple: int
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length-1"], Int[Tensor, "batch length"]]:
    """(ids, mask, positions) of a row per group, its sequences end to end; positions begin anew with each sequence."""
    width = padded_length(max(sum(map(_length, group)) for group in groups), multiple)
    ids = torch.full((len(groups), width), pad)
    mask = torch.zeros(len(groups), width - 1, dtype=torch.bool)
    positions = torch.zeros_like(ids)
    for i, group in enumerate(groups):
        begin = 0
        for prompt, response in group:
            end = begin + len(prompt) + len(response)
            ids[i, begin:end] = torch.tensor(prompt + response)
            # the first token of a sequence is predicted by nothing, least of all by the sequence before it
            mask[i, begin + max(len(prompt), 1) - 1 : end - 1] = True
            positions[i, begin:end] = torch.arange(end - begin)
            begin = end
    return ids, mask, positions


def _length(row: Row) -> int:
    return len(row[0]) + len(row[1])


def _token_rewards(trajectory: Trajectory) -> list[float]:
    rewards = list(trajectory.step_rewards or [0.0] * len(trajectory.response_ids))
    rewards[-1] += trajectory.reward
    return rewards


def _spread(values: Sequence[Sequence[float]], mask: Bool[Tensor, "batch steps"]) -> Float[Tensor, "batch steps"]:
    """Values of the response tokens at their places, zero elsewhere."""
    flat = torch.tensor([value for row in values for value in row], dtype=torch.float32)
    return torch.zeros(mask.shape).masked_scatter(mask, flat)


def _scalar(value: float) -> Float[Tensor, ""]:
    return torch.tensor(value, dtype=torch.float32)
