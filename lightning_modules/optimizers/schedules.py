"""Learning-rate factors: what the learning rate of a step is multiplied by."""

import math


def warmup_cosine(step: int, total: int, warmup: int, final: float = 0.0) -> float:
    """Linear from 1 / warmup to 1 over `warmup` steps, then half a cosine down to `final` at step `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_constant(step: int, total: int, warmup: int) -> float:
    """Linear from 1 / warmup to 1 over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))
