"""Learning-rate factors: what the learning rate of a step is multiplied by, with steps counted from 0."""

import math
from collections.abc import Callable

# what the factor of step i < warmup is
RAMPS: dict[str, Callable[[int, int], float]] = {
    "full": lambda step, warmup: (step + 1) / warmup,  # reaches 1 within the warm-up
    "zero": lambda step, warmup: step / warmup,  # the first step does not move (code of arXiv 2411.10438)
    "inner": lambda step, warmup: (step + 1) / (warmup + 1),  # between 0 and 1 (nanoGPT)
}
# from 1 at the start of the decay to 0 at its end
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: math.sqrt(1 - progress),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def warmup_cosine(step: int, total: int, warmup: int, final: float = 0.0, ramp: str = "full") -> float:
    """Linear to 1 over `warmup` steps, then half a cosine down to `final` at step `total`."""
    if step < warmup:
        return _ramp(step, warmup, ramp)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, total)))


def warmup_constant(step: int, total: int, warmup: int) -> float:
    """Linear from 1 / warmup to 1 over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))


def warmup_stable_decay(
    step: int,
    total: int,
    warmup: int,
    stable: float = 0.8,
    decay: str = "linear",
    final: float = 0.0,
    ramp: str = "full",
) -> float:
    """Linear to 1 over `warmup` steps, 1 until the fraction `stable` of `total`, then down to `final`.

    `decay` is the shape: "linear", "sqrt" (of what is left), "1-sqrt" (of what is done) or "exp", with `final` > 0.
    """
    if step < warmup:
        return _ramp(step, warmup, ramp)
    progress = _progress(step, max(warmup, round(stable * total)), total)
    if decay == "exp":
        return _exponential(progress, final)
    if decay not in DECAYS:
        raise ValueError(f"scheduler.decay={decay}: there are {', '.join(DECAYS)}, exp")
    return final + (1 - final) * DECAYS[decay](progress)


def warmup_exponential(step: int, total: int, warmup: int, final: float = 0.9**100, ramp: str = "full") -> float:
    """Linear to 1 over `warmup` steps, then final^progress; by default 0.9^(100 progress), as with arXiv 2411.10438."""
    return _ramp(step, warmup, ramp) if step < warmup else _exponential(_progress(step, warmup, total), final)


def _ramp(step: int, warmup: int, ramp: str) -> float:
    if ramp not in RAMPS:
        raise ValueError(f"scheduler.ramp={ramp}: there are {', '.join(RAMPS)}")
    return RAMPS[ramp](step, warmup)


def _progress(step: int, begin: int, end: int) -> float:
    return min(1.0, max(0.0, (step - begin) / max(1, end - begin)))


def _exponential(progress: float, final: float) -> float:
    if not final > 0:
        raise ValueError(f"scheduler.final={final}: an exponential decay ends above 0; take for example 0.01")
    return final**progress
