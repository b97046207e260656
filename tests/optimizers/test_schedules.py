"""Schedules at their corners, by closed form."""

import math

import pytest

from lightning_modules.optimizers.schedules import (
    warmup_constant,
    warmup_cosine,
    warmup_exponential,
    warmup_stable_decay,
)

W, D = 10, 110  # warm-up and end, steps
HALF = (W + D) // 2


@pytest.mark.parametrize(
    ("ramp", "first", "last"), [("full", 0.1, 1.0), ("zero", 0.0, 0.9), ("inner", 1 / 11, 10 / 11)]
)
@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_stable_decay, warmup_exponential])
def test_the_conventions_of_the_warm_up(schedule, ramp, first, last):
    assert schedule(0, D, W, ramp=ramp) == pytest.approx(first)
    assert schedule(W - 1, D, W, ramp=ramp) == pytest.approx(last)
    assert schedule(W, D, W, ramp=ramp) == 1


def test_cosine():
    assert warmup_cosine(HALF, D, W, final=0.1) == pytest.approx(0.55)
    assert warmup_cosine(W + 25, D, W, final=0.1) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert warmup_cosine(D, D, W, final=0.1) == warmup_cosine(D + 5, D, W, final=0.1) == pytest.approx(0.1)


def test_constant():
    assert [warmup_constant(step, D, W) for step in (0, W - 1, D + 5)] == [0.1, 1.0, 1.0]


@pytest.mark.parametrize(
    ("decay", "half"), [("linear", 0.5), ("sqrt", math.sqrt(0.5)), ("1-sqrt", 1 - math.sqrt(0.5)), ("exp", 0.1)]
)
def test_warmup_stable_decay(decay, half):
    options = {"stable": 0.5, "decay": decay, "final": 0.01}
    assert [warmup_stable_decay(step, D, W, **options) for step in (W, 54, 55)] == [1, 1, 1]
    middle = warmup_stable_decay(82, 2 * 82 - 55, W, **{**options, "stable": 55 / 109})
    assert middle == pytest.approx(half if decay == "exp" else 0.01 + 0.99 * half)
    assert warmup_stable_decay(D, D, W, **options) == warmup_stable_decay(D + 5, D, W, **options) == pytest.approx(0.01)


def test_exponential():
    assert warmup_exponential(HALF, D, W) == pytest.approx(0.9**50)
    assert warmup_exponential(D, D, W) == pytest.approx(0.9**100)


def test_unknown_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"scheduler\.decay=cubic.*1-sqrt"):
        warmup_stable_decay(100, D, W, decay="cubic")
    with pytest.raises(ValueError, match=r"scheduler\.ramp=half.*zero"):
        warmup_cosine(0, D, W, ramp="half")
    with pytest.raises(ValueError, match=r"scheduler\.final=0"):
        warmup_exponential(50, D, W, final=0.0)
