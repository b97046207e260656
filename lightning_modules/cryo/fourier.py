"""Density cubes in Fourier space: shells, power spectra, Fourier shell correlation, filters, noise and masks.

A map is v[z, y, x] with N voxels of a angstroms a side; F is the unnormalised transform, so white noise of variance s^2
has E|F n|^2 = s^2 N^3. Shell s holds the frequencies with N a |k| near s, hence the resolution N a / s angstroms;
shell N/2 is the Nyquist frequency, and the corners beyond it belong to no shell. Everything works on the half of the
spectrum that `rfftn` keeps, each of its voxels counted as often as it and its Friedel mate occur in the whole one.
"""

import functools
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

Maps = Float[Tensor, "*batch n n n"]
Spectrum = Float[Tensor, "*batch n n half"]  # a real number for each voxel of the half spectrum
Curve = Float64[Tensor, "*batch shells"]  # a number for each shell from 0 to Nyquist
Binning = Literal["round", "ceil", "floor", "linear"]
SPACE = (-3, -2, -1)


def transform(volumes: Maps) -> Tensor:
    """F v, the half spectrum as complex numbers; half precision is raised to float32, which every FFT knows."""
    return torch.fft.rfftn(volumes if volumes.dtype == torch.float64 else volumes.float(), dim=SPACE)


def inverse(spectra: Tensor, side: int) -> Tensor:
    """The real maps of `side` voxels whose half spectra these are."""
    return torch.fft.irfftn(spectra, s=(side,) * 3, dim=SPACE)


# Shells


def wave_vectors(side: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Integer frequencies N a k along z, y and x, shaped to broadcast over the half spectrum."""
    half = torch.arange(side // 2 + 1, device=device, dtype=torch.float64)
    whole = torch.arange(side, device=device, dtype=torch.float64)
    whole = torch.where(whole < (side + 1) // 2, whole, whole - side)
    return whole[:, None, None], whole[None, :, None], half[None, None, :]


def radius(side: int, device: torch.device | None = None) -> Float64[Tensor, "n n half"]:
    """|k| of every voxel of the half spectrum, in shells (N a |k|)."""
    return sum(k.square() for k in wave_vectors(side, device)).sqrt()


def multiplicity(side: int, device: torch.device | None = None) -> Float64[Tensor, "n n half"]:
    """How many voxels of the whole spectrum a voxel of the half stands for: 2, and 1 where its mate is kept too."""
    times = torch.full((side // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    times[0] = 1
    if side % 2 == 0:
        times[-1] = 1
    return times.expand(side, side, -1)


def shell_of(side: int, device: torch.device | None = None, binning: Binning = "round") -> Int64[Tensor, "n n half"]:
    """The shell of every voxel; what lies beyond Nyquist is in shell N//2 + 1.

    Programs differ: RELION and we round, CryoFM takes the ceiling for FSC curves and the floor for power spectra.
    """
    to_integer = {"round": torch.round, "ceil": torch.ceil, "floor": torch.floor}[binning]
    return to_integer(radius(side, device)).long().clamp_(max=side // 2 + 1)


def shell_sum(values: Spectrum, side: int, binning: Binning = "round") -> Curve:
    """Sums over the whole spectrum's voxels by shell, in float64.

    `linear` shares every voxel between its two neighbouring shells by distance, as teamtomo's packages do.
    """
    if binning == "linear":
        where = radius(side, values.device)
        below = where.floor()
        shares = ((below, 1 - (where - below)), (below + 1, where - below))
    else:
        shares = ((shell_of(side, values.device, binning), 1),)
    times, size = multiplicity(side, values.device), side // 2 + 2
    flat = values.double().flatten(-3)
    sums = flat.new_zeros(*flat.shape[:-1], size)
    for shell, share in shares:
        label = shell.long().clamp(max=size - 1).flatten()
        sums.index_add_(-1, label, flat * (times * share).flatten())
    return sums[..., :-1]


def shell_count(
    side: int, device: torch.device | None = None, binning: Binning = "round"
) -> Float64[Tensor, " shells"]:
    """Voxels of the whole spectrum in every shell: 1, 18, 62, 98, 210, ... with rounding."""
    return shell_sum(torch.ones(side, side, side // 2 + 1, dtype=torch.float64, device=device), side, binning)


def shell_mean(values: Spectrum, side: int, binning: Binning = "round") -> Curve:
    """Means over the voxels of a shell."""
    return shell_sum(values, side, binning) / shell_count(side, values.device, binning)


def power_spectrum(volumes: Maps, binning: Binning = "round") -> Curve:
    """Mean |F v|^2 of every shell."""
    return shell_mean(_power(transform(volumes)), volumes.shape[-1], binning)


def on_shells(curve: Float[Tensor, "*batch shells"], side: int, beyond: float | None = None) -> Tensor:
    """A curve's value at every voxel of the half spectrum, by rounding; corners get `beyond`, or the last shell's."""
    last = curve[..., -1:] if beyond is None else torch.full_like(curve[..., -1:], beyond)
    return torch.cat([curve, last], -1)[..., shell_of(side, curve.device)]


def _power(spectra: Tensor) -> Tensor:
    return spectra.real.square() + spectra.imag.square()


# Fourier shell correlation


def fsc(a: Maps, b: Maps, binning: Binning = "round") -> Curve:
    """FSC[s] = Re sum A conj(B) / sqrt(sum |A|^2 sum |B|^2) over the voxels of shell s = 0..N/2.

    Sums are in float64. NaN where a map has no power at all, which `auc` leaves out. No positive function of the shell
    that multiplies either map's transform changes it. White noise has the standard deviation 1 / sqrt(voxels).
    """
    of_a, of_b, side = transform(a), transform(b), a.shape[-1]
    cross = of_a.real * of_b.real + of_a.imag * of_b.imag
    both = [shell_sum(values, side, binning) for values in (cross, _power(of_a), _power(of_b))]
    powers = both[1] * both[2]
    return torch.where(powers > 0, both[0] / powers.sqrt(), torch.nan)


def auc(curve: Float[Tensor, "*batch shells"]) -> Float[Tensor, "*batch"]:
    """FSC-AUC: the mean of an FSC curve over the shells 1..N/2, those without power left out."""
    return curve[..., 1:].nanmean(-1)


class Resolution(NamedTuple):
    """Where a curve falls to a threshold: in angstroms, and whether that lies outside of the shells."""

    angstroms: float
    outside: Literal["", "beyond Nyquist", "beyond the box"]


def resolution(curve: Float[Tensor, " shells"], side: int, voxel_size: float, threshold: float = 0.143) -> Resolution:
    """N a / s at the first shell s with FSC <= threshold, linearly between it and the shell before.

    0.143 belongs to half maps, 0.5 to a map against the truth (`to_truth`). A curve that never falls gives twice the
    voxel size, "beyond Nyquist"; one whose first shell is below already gives the box, "beyond the box".
    """
    values = curve.tolist()
    below = next((s for s in range(1, len(values)) if values[s] <= threshold), None)
    if below is None:
        return Resolution(2 * voxel_size, "beyond Nyquist")
    if below == 1:
        return Resolution(side * voxel_size, "beyond the box")
    above, now = values[below - 1], values[below]
    # a shell without power is NaN and never below; after one there is nothing to interpolate from
    step = 0.0 if math.isnan(above) else (now - threshold) / (above - now) if above > now else 0.0
    return Resolution(side * voxel_size / (below + step), "")


def to_truth(half_maps: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """C_ref = sqrt(2 F / (1 + F)): FSC of the full map with the truth, from that between half maps; 0 where F < 0."""
    positive = half_maps.clamp(min=0)
    return (2 * positive / (1 + positive)).sqrt()


def signal_to_noise(half_maps: Float[Tensor, "*shape"], smallest: float = 1e-3) -> Float[Tensor, "*shape"]:
    """F / (1 - F): the ratio of powers in one half map from the FSC between two.

    At least `smallest`: with shells at zero a map would be all noise (the published code takes 1e-9). NaN counts as 0.
    """
    correlation = half_maps.nan_to_num(nan=0.0).clamp(max=1 - 1e-6)
    return (correlation / (1 - correlation)).clamp(min=smallest)


class MaskedFSC(NamedTuple):
    """FSC curves of two half maps: as they are, under a mask, with random phases under it, and corrected for it."""

    unmasked: Float64[Tensor, " shells"]
    masked: Float64[Tensor, " shells"]
    randomised: Float64[Tensor, " shells"]
    corrected: Float64[Tensor, " shells"]


def masked_fsc(
    a: Float[Tensor, "n n n"], b: Float[Tensor, "n n n"], mask: Float[Tensor, "n n n"], generator: torch.Generator
) -> MaskedFSC:
    """FSC under a soft mask, and what the mask alone contributes to it (Chen et al. 2013, as RELION does).

    Phases are randomised from the first shell on where the unmasked FSC is below 0.8; two shells later
    FSC_true = (FSC_masked - FSC_random) / (1 - FSC_random), and before that FSC_masked is taken as it is.
    """
    unmasked, masked = fsc(a, b), fsc(a * mask, b * mask)
    low = (unmasked[1:] < 0.8).nonzero()
    first = int(low[0, 0]) + 1 if len(low) else len(unmasked)
    mixed_a, mixed_b = (phases_randomised(half, first, generator) for half in (a, b))
    randomised = fsc(mixed_a * mask, mixed_b * mask)
    corrected = masked.clone()
    later = slice(first + 2, None)
    corrected[later] = (masked[later] - randomised[later]) / (1 - randomised[later])
    return MaskedFSC(unmasked, masked, randomised, corrected)


def phases_randomised(volumes: Maps, first_shell: int, generator: torch.Generator) -> Maps:
    """The same amplitudes, with random phases from `first_shell` on; still real, since the phases are a real map's."""
    side = volumes.shape[-1]
    spectra = transform(volumes)
    white = torch.randn(volumes.shape, generator=generator, device=volumes.device, dtype=spectra.real.dtype)
    mixed = torch.polar(spectra.abs(), transform(white).angle())
    beyond = shell_of(side, volumes.device) >= first_shell
    return inverse(torch.where(beyond, mixed, spectra), side).to(volumes.dtype)


def local_fsc(
    a: Float[Tensor, "n n n"], b: Float[Tensor, "n n n"], window: int, step: int
) -> Float64[Tensor, "m m m shells"]:
    """FSC in windows of `window` voxels under a Hann profile, `step` voxels apart: where a map is good.

    m = (n - window) // step + 1 windows a side, the first at the corner. Windows correlate a little by their profile
    alone, as under any mask: compare windows with each other, not with the curve of the whole map.
    """
    profile = torch.hann_window(window, periodic=False, dtype=a.dtype, device=a.device).add_(1e-3)
    shape = profile[:, None, None] * profile[None, :, None] * profile
    rows = []
    for start in range(0, a.shape[0] - window + 1, step):
        slabs = [half[start : start + window].unfold(1, window, step).unfold(2, window, step) for half in (a, b)]
        rows.append(fsc(*(slab.permute(1, 2, 0, 3, 4) * shape for slab in slabs)))
    return torch.stack(rows)


# Filters, noise and masks


def filtered(volumes: Maps, gain: Float[Tensor, "*gains n n half"]) -> Maps:
    """A map whose transform is multiplied by a real, even gain; `on_shells` makes one of a curve."""
    side = volumes.shape[-1]
    spectra = transform(volumes)
    return inverse(spectra * gain.to(spectra.real.dtype), side).to(volumes.dtype)


def low_pass(volumes: Maps, angstroms: float, voxel_size: float, width: float = 2.0) -> Maps:
    """A map without what is finer than `angstroms`: a cosine edge `width` shells wide, half of it on either side."""
    side = volumes.shape[-1]
    where = radius(side, volumes.device) - side * voxel_size / angstroms
    return filtered(volumes, 0.5 * (1 - torch.sin(math.pi * (where / width).clamp(-0.5, 0.5))))


def shaped_noise(power: Spectrum, side: int, generator: torch.Generator) -> Maps:
    """A real Gaussian field with E n = 0 and E |F n|^2 = `power`, an even function on the half spectrum.

    n = F^-1 [ sqrt(power / N^3) F w ] for white noise w: the transform of a real map has the symmetry that is needed.
    """
    white = torch.randn(
        (*power.shape[:-3], side, side, side), generator=generator, device=power.device, dtype=power.dtype
    )
    return inverse(transform(white) * (power / side**3).sqrt(), side).to(power.dtype)


def soft_mask(
    volumes: Float[Tensor, "*batch n n n"], threshold: float, dilate: int = 2, edge: int = 5
) -> Float[Tensor, "*batch n n n"]:
    """1 within `dilate` voxels of where the map exceeds `threshold`, then a cosine edge of `edge` voxels down to 0.

    An edge of at least 3 voxels keeps the mask's own transform away from high shells.
    """
    if edge < 3:
        raise ValueError(f"edge={edge}: a soft edge needs at least 3 voxels, or its own transform shows in the FSC")
    distance = _squared_distance(volumes > threshold, dilate + edge + 1).sqrt().to(volumes.dtype)
    return 0.5 * (1 + torch.cos(math.pi * ((distance - dilate) / (edge + 1)).clamp(0, 1)))


def _squared_distance(inside: Bool[Tensor, "*batch n n n"], reach: int) -> Float[Tensor, "*batch n n n"]:
    """Squared Euclidean distance to the nearest voxel of a set, exact up to `reach` voxels, at least reach^2 beyond.

    One axis after the other: d^2(x) = min over shifts s of d^2(x + s) + s^2.
    """
    far = float(reach**2)
    squared = torch.where(inside, 0.0, far)
    for axis in SPACE:
        padded = F.pad(squared.movedim(axis, -1), (reach, reach), value=far)
        windows = (padded[..., reach + s : reach + s + squared.shape[-1]] + s * s for s in range(-reach, reach + 1))
        squared = functools.reduce(torch.minimum, windows).movedim(-1, axis)
    return squared
