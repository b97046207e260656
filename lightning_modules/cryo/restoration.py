"""Restoring a map from its halves: every tile of each half, several times, into a mean and a standard deviation.

A draw restores all tiles of both half maps, blends each half, and averages the two. What a draw is depends on the seed
and its number alone, so a restoration that was cut off goes on from its `State` to the same map.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.cryo.operators import Operator
from lightning_modules.cryo.posterior import Guidance, draw
from lightning_modules.cryo.tiling import Tiling
from lightning_modules.processes.ode import Sampler
from lightning_modules.processes.prediction import Prediction

Volume = Float[Tensor, "n n n"]


@dataclass
class State:
    """What has been restored: batches of tiles done, the draw at work, mean and squared deviations of those before."""

    done: int
    current: Volume
    mean: Volume
    squares: Volume
    draws: int

    @classmethod
    def begin(cls, side: int) -> "State":
        return cls(0, *(torch.zeros(side, side, side, dtype=torch.float64) for _ in range(3)), 0)

    def finish_draw(self) -> None:
        """Take the draw at work into mean and squared deviations (Welford)."""
        self.draws += 1
        before = self.current - self.mean
        self.mean += before / self.draws
        self.squares += before * (self.current - self.mean)
        self.current.zero_()

    @property
    def deviation(self) -> Volume:
        """The standard deviation between draws; zero where there is only one."""
        return (self.squares / max(self.draws - 1, 1)).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a file."""
        counts = {name: torch.tensor(getattr(self, name)) for name in ("done", "draws")}
        return counts | {name: getattr(self, name) for name in ("current", "mean", "squares")}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "State":
        """The state in a file."""
        counts = {name: int(tensors[name]) for name in ("done", "draws")}
        return cls(**counts, **{name: tensors[name] for name in ("current", "mean", "squares")})


@dataclass(frozen=True)
class Restoration:
    """How maps are restored: the prior and the way to sample it, tiles, draws, tiles at once and the seed."""

    prior: Prediction
    guidance: Guidance
    sampler: Sampler
    grid: Float[Tensor, " times"]
    tiling: Tiling
    draws: int = 4
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("draws", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")

    def batches(self, maps: int) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
        """All work in its order: the draw, the half map, the corners of some tiles."""
        corners = self.tiling.corners
        parts = [corners[start : start + self.batch] for start in range(0, len(corners), self.batch)]
        return [(number, half, part) for number in range(self.draws) for half in range(maps) for part in parts]

    def __call__(
        self,
        operator: Operator,
        halves: Float[Tensor, "half n n n"],
        state: State | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[State]:
        """The state after every batch of tiles, the last one whole. `operator` measures a tile, in the prior's units.

        `state` is where to go on. What is yielded is the same object, changed in place.
        """
        state = state or State.begin(self.tiling.side)
        work = self.batches(len(halves))
        noise, noise_of = None, None
        for place, (number, half, corners) in enumerate(work):
            if place < state.done:
                continue
            if noise_of != (number, half):
                noise, noise_of = self.noise(number, half, halves), (number, half)
            cut = (self.tiling.cut(volume, corners) for volume in (halves[half], noise))
            measured, start = cut
            tiles = draw(self.prior, self.guidance, operator, measured, start, self.sampler, self.grid, progress)
            self.tiling.add(state.current, corners, tiles.cpu() / len(halves))
            state.done = place + 1
            if place + 1 == len(work) or work[place + 1][0] != number:
                state.finish_draw()
            yield state

    def noise(self, number: int, half: int, like: Tensor) -> Volume:
        """The noise that a draw of a half begins with: one volume for all tiles, the same on every device."""
        noise = torch.randn((self.tiling.side,) * 3, generator=seeded(self.seed, number, half))
        return noise.to(like)


def seeded(*of: object) -> torch.Generator:
    """The generator, on the CPU, of what depends on these things alone."""
    digest = hashlib.sha256("/".join(map(str, of)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))
