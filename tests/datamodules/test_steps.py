import pytest
import torch

from datamodules.steps import WINDOW, FromStep, StepIndexed

LENGTHS = [5 + (7 * i) % 23 for i in range(50)]
TOKENS = [1 + i % 4 for i in range(50)]


def stream(**changes):
    settings = {"batch_size": 8, "seed": 3, "cook": lambda rows, share: (rows, share)} | changes
    return StepIndexed(LENGTHS, TOKENS, **settings)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_the_global_batch_of_a_step_is_the_same_on_any_number_of_processes(world, accumulate):
    whole = stream()
    for step in (0, 5, 17, 200):
        parts = [
            stream(rank=rank, world=world, accumulate=accumulate)[step * accumulate + part]
            for rank in range(world)
            for part in range(accumulate)
        ]
        assert sorted(row for rows, _ in parts for row in rows) == sorted(whole[step][0])
        assert len({len(rows) for rows, _ in parts}) == 1


def test_token_share_turns_sums_of_micro_batches_into_the_mean_of_the_global_batch():
    loss = torch.rand(50)
    rows, share = stream()[4]
    whole = sum(loss[r] * TOKENS[r] for r in rows) / share
    parts = [stream(rank=rank, world=2, accumulate=2)[8 + part] for rank in range(2) for part in range(2)]
    mean = sum(sum(loss[r] * TOKENS[r] for r in rows) / share for rows, share in parts) / 4
    torch.testing.assert_close(mean, whole)
    assert share == sum(TOKENS[r] for r in rows)


def test_every_row_comes_once_in_each_pass():
    data = StepIndexed(LENGTHS[:48], TOKENS[:48], 6, 0, lambda rows, share: rows)
    seen = [row for step in range(WINDOW) for row in data[step]]
    assert sorted(seen) == list(range(48))
    again = [row for step in range(WINDOW, 2 * WINDOW) for row in data[step]]
    assert sorted(again) == list(range(48))
    assert again != seen


def test_a_batch_holds_rows_of_similar_length():
    batches = [[LENGTHS[row] for row in stream().rows(step)] for step in range(8)]
    spread = [max(lengths) - min(lengths) for lengths in batches]
    assert sum(spread) / 8 < (max(LENGTHS) - min(LENGTHS)) / 3


def test_fewer_rows_than_a_batch_are_repeated():
    data = StepIndexed([3, 4], [1, 1], 4, 0, lambda rows, share: rows)
    assert len(data) == 1
    assert all(len(data[step]) == 4 for step in range(20))


def test_the_sampler_goes_on_at_the_step_that_is_told():
    data = stream(accumulate=2)
    assert len(data) == 12
    assert list(FromStep(data, lambda: 0)) == list(range(12))
    assert list(FromStep(data, lambda: 4)) == list(range(8, 12))
    assert list(FromStep(data, lambda: 6)) == list(range(12, 24))


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match=r"data\.batch_size=8 .* multiple of 3"):
        stream(world=3)
    with pytest.raises(ValueError, match="no row to train on"):
        StepIndexed([], [], 4, 0, lambda rows, share: rows)
