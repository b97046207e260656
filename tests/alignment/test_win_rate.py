"""The win rate is a mean over prompts, whatever process holds them."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_modules.alignment.win_rate import WinRate

P_WIN = torch.rand(23, generator=torch.Generator().manual_seed(0))
PARTS = (list(range(0, 23, 2)), [*range(1, 23, 2), 0])  # a sampler that evens out repeats the first


def measured(rows: list[int]) -> WinRate:
    metric = WinRate()
    for row in rows:
        metric.update(P_WIN[row : row + 1], torch.tensor([row]))
    return metric


def process(rank: int, parts: tuple[list[int], ...], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(parts))
    metric = measured(parts[rank])
    torch.save(torch.tensor([metric.compute().item(), *metric.interval()], dtype=torch.float64), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_processes(parts: tuple[list[int], ...], folder: Path) -> list[torch.Tensor]:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=(rank, parts, str(folder))) for rank in range(len(parts))]
    for each in started:
        each.start()
    for each in started:
        each.join(60)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(parts))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parts", [PARTS, (list(range(23)), [])], ids=["dealt out", "one has none"])
def test_two_processes_say_what_one_says_to_the_last_bit(parts, tmp_path):
    one = measured(list(range(23)))
    expected = torch.tensor([one.compute().item(), *one.interval()], dtype=torch.float64)
    for theirs in on_processes(parts, tmp_path):
        assert torch.equal(theirs, expected)


def test_the_order_and_copies_of_prompts_do_not_matter():
    metric = measured([4, 1, 3, 1, 0, 2])
    assert metric.compute().item() == pytest.approx(P_WIN[:5].mean().item(), abs=1e-7)
    low, high = metric.interval()
    assert low < metric.compute() < high


def test_what_is_no_probability_is_refused_with_its_prompt():
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"at prompt 7 is .*: an oracle must say a number in \[0, 1\]"):
            WinRate().update(torch.tensor([0.5, value]), torch.tensor([6, 7]))
