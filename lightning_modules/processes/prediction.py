"""What a network or a formula predicts along a path, in whichever form a sampler asks for."""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from lightning_modules.processes.paths import KINDS, Path, State, Time, determined

Predict = Callable[[State, Time], State]  # x and one time per sample, at least float32
Guide = Callable[[State, Time, State, State], State]  # (x, t, data, velocity) -> velocity


class Prediction:
    """`predict(x, t)` of the given `kind` on a `path`, answering as noise, data, velocity, score or drift (dx/dt).

    Each answer is one evaluation. `guide` may change the velocity, of which every other form then follows; it sees the
    state, the times, the predicted data and the velocity, and may differentiate through `predict` by itself.
    """

    def __init__(self, path: Path, predict: Predict, kind: str, guide: Guide | None = None) -> None:
        if kind not in KINDS:
            raise ValueError(f"there is no prediction of kind {kind!r}: take one of {', '.join(KINDS)}")
        self.path, self.predict, self.guide = path, predict, guide
        self.predicted, self.kind = kind, "velocity" if guide else kind

    def noise(self, x: State, t: Time) -> State:
        return self.as_kind("noise", x, t)

    def data(self, x: State, t: Time) -> State:
        return self.as_kind("data", x, t)

    def velocity(self, x: State, t: Time) -> State:
        return self.as_kind("velocity", x, t)

    def score(self, x: State, t: Time) -> State:
        return self.as_kind("score", x, t)

    def drift(self, x: State, t: Time) -> State:
        """dx/dt of the probability-flow equation."""
        return self.as_kind("drift", x, t)

    def as_kind(self, kind: str, x: State, t: Time) -> State:
        return self.path.convert(x, self._evaluated(x, t), t, self.kind, kind)

    def determines(self, kind: str, t: Time) -> Bool[Tensor, "*times"]:
        """Whether this kind follows from what is predicted, at each of these times."""
        return determined(*self.path.conversion(self.kind, kind, t.double()))

    def _evaluated(self, x: State, t: Time) -> State:
        times = t.to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        value = self.predict(x, times)
        if self.guide is None:
            return value
        data, velocity = (self.path.convert(x, value, t, self.predicted, kind) for kind in ("data", "velocity"))
        return self.guide(x, times, data, velocity)
