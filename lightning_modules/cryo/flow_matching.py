"""Flow matching on density cubes: the loss, the law of its times, and what simple predictors reach in closed form.

x_t = (1 - t) x_0 + t eps for data x_0 and white noise eps; a network learns the velocity eps - x_0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lightning_modules.cryo.fourier import multiplicity, radius, transform
from lightning_modules.processes.paths import Linear

Cubes = Float[Tensor, "batch n n n"]
Times = Float[Tensor, " batch"]
STREAMS = {"train": 0, "val": 1, "test": 2, "sample": 3}


def loss(network: Callable[[Cubes, Times], Cubes], data: Cubes, noise: Cubes, t: Times) -> Float[Tensor, " batch"]:
    """Mean over the voxels of |v(x_t, t) - (eps - x_0)|^2, unweighted (arXiv 2410.08631; x_0 is the data here)."""
    path = Linear()
    error = network(path.sample(data, noise, t), t).float() - path.target("velocity", data, noise, t)
    return error.square().flatten(1).mean(1)


# What is drawn for a cube depends on the seed and on the cube's place alone


def uniform(generator: torch.Generator) -> Tensor:
    """t = i / 1000 with i even over 0..1000, as CryoFM-S is trained."""
    return torch.randint(1001, (), generator=generator, device=generator.device) / 1000


def logit_normal(generator: torch.Generator) -> Tensor:
    """t = i / 1000, i = 1040 / (1 + e^-n) - 20 rounded towards 0 within 0..1000, n from N(0, 1), as in CryoFM-L.

    Its ends have some weight of their own, unlike those of a plain logit-normal law.
    """
    normal = torch.randn((), generator=generator, device=generator.device)
    return (normal.sigmoid() * 1040 - 20).trunc().clamp(0, 1000) / 1000


LAWS: dict[str, Callable[[torch.Generator], Tensor]] = {"uniform": uniform, "logit_normal": logit_normal}


def generator(seed: int, purpose: str, place: int, device: torch.device) -> torch.Generator:
    """The source of what is random about one cube."""
    state = np.random.SeedSequence((seed % 2**63, STREAMS[purpose], place)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def drawn_noise(seed: int, purpose: str, places: Sequence[int], side: int, device: torch.device) -> Cubes:
    """White noise for each of these places."""
    sources = (generator(seed, purpose, place, device) for place in places)
    return torch.stack([torch.randn((side,) * 3, generator=source, device=device) for source in sources])


def drawn(
    law: Callable[[torch.Generator], Tensor], seed: int, places: Sequence[int], side: int, device: torch.device
) -> tuple[Times, Cubes]:
    """Times and noise of a batch of training, one of each for every place."""
    times, noise = [], []
    for place in places:
        source = generator(seed, "train", place, device)
        times.append(law(source))
        noise.append(torch.randn((side,) * 3, generator=source, device=device))
    return torch.stack(times), torch.stack(noise)


# What can be reached without learning


class Spectrum(NamedTuple):
    """Power at every rounded distance from the origin of Fourier space, out to its corner, and the voxels there."""

    power: Float64[Tensor, "*batch radii"]  # mean |F x|^2 / N^3: 1 everywhere for white noise of unit variance
    voxels: Float64[Tensor, " radii"]


def spectrum(cubes: Float[Tensor, "*batch n n n"]) -> Spectrum:
    """The radial power spectrum of each cube; unlike `fourier.power_spectrum` with the corners beyond Nyquist."""
    side = cubes.shape[-1]
    where = radius(side, cubes.device).round().long().flatten()
    times = multiplicity(side, cubes.device).flatten()
    power = (transform(cubes).abs().double().square() / side**3).flatten(-3) * times
    voxels = times.new_zeros(int(where.max()) + 1).index_add_(0, where, times)
    sums = power.new_zeros(*power.shape[:-1], len(voxels)).index_add_(-1, where, power)
    return Spectrum(sums / voxels, voxels)


def linear_loss(power: Float[Tensor, "*shape"], t: float) -> Float[Tensor, "*shape"]:
    """The loss of the best linear prediction of the velocity from x_t, for data of second moment p.

    1 + p - (t - (1 - t) p)^2 / (t^2 + (1 - t)^2 p); with p = 1 that is 2 - (2 t - 1)^2 / (t^2 + (1 - t)^2).
    """
    return 1 + power - (t - (1 - t) * power).square() / (t**2 + (1 - t) ** 2 * power)


def baselines(mean: Spectrum, t: float) -> dict[str, float]:
    """Losses at time t of predictors that know no more of the data than its mean spectrum.

    `zero` predicts nothing, `voxel` is linear in every voxel by itself, `shell` in every Fourier shell (Wiener): the
    best that can be done for Gaussian data. The spectrum is that of the data they are compared on, which favours them.
    """
    share = mean.voxels / mean.voxels.sum()
    variance = (mean.power * share).sum()
    return {
        "zero": float(1 + variance),
        "voxel": float(linear_loss(variance, t)),
        "shell": float((linear_loss(mean.power, t) * share).sum()),
    }


def log_power_difference(
    ours: Float[Tensor, " radii"], theirs: Float[Tensor, " radii"], side: int
) -> Float[Tensor, ""]:
    """Root mean square over the shells 1 to Nyquist of the difference of log10 of two mean spectra."""
    shells = slice(1, side // 2 + 1)
    return torch.log10(ours[shells] / theirs[shells]).square().mean().sqrt()


def per_place(places: Int[Tensor, " rows"], rows: Float[Tensor, "rows *shape"]) -> Float[Tensor, "places *shape"]:
    """Rows in the order of their places, one for each: an evaluation on several processes may repeat some."""
    order = places.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = places[order][1:] != places[order][:-1]
    return rows[order[first]]
