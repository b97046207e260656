"""Measurements of a density: y = A x + n, as what the transform of a map is multiplied by and the noise it gets.

Noise in single-particle maps is close to independent between Fourier voxels, and a missing wedge removes whole voxels,
so most measurements are diagonal in Fourier space. Those compose: `outer @ inner` measures what `inner` returns.
Published posterior sampling (arXiv 2410.08631) draws new noise inside of the likelihood; here A x is free of noise.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_modules.cryo.fourier import (
    Curve,
    Maps,
    Spectrum,
    filtered,
    fsc,
    inverse,
    multiplicity,
    on_shells,
    power_spectrum,
    shaped_noise,
    shell_mean,
    signal_to_noise,
    to_truth,
    transform,
    wave_vectors,
)

Half = Float[Tensor, "n n half"]
Axis = Literal["z", "y", "x"]
AXES: dict[str, int] = {"z": 0, "y": 1, "x": 2}


@runtime_checkable
class Operator(Protocol):
    """A measurement: its mean, a noisy draw, and how badly a density explains what was measured."""

    def __call__(self, volumes: Tensor) -> Tensor: ...

    def measure(self, volumes: Tensor, generator: torch.Generator) -> Tensor: ...

    def misfit(self, volumes: Tensor, measured: Tensor, spread: float | Tensor = 0.0) -> Tensor: ...

    def standardised(self, measured: Tensor, shift: float, scale: float) -> "tuple[Tensor, Operator]": ...


@dataclass(frozen=True)
class FourierOperator:
    """F y = gain F x + F n with independent noise of power `noise_power` = E|F n|^2, both on the half spectrum.

    `gain` is real and even; where it is zero nothing is measured, and noise there has no meaning. What is measured
    without noise (`exact`) can only be put in, not weighed. Maps of a batch may have noise powers of their own.
    """

    gain: Half
    noise_power: Spectrum

    @property
    def side(self) -> int:
        """Voxels along an edge."""
        return self.gain.shape[0]

    @property
    def mask(self) -> Tensor:
        """Which voxels of the half spectrum are measured."""
        return self.gain != 0

    @property
    def exact(self) -> bool:
        """Whether what is measured is free of noise."""
        return not bool((self.noise_power * self.mask > 0).any())

    def __matmul__(self, inner: "FourierOperator") -> "FourierOperator":
        """This measurement of what `inner` returns: gains multiply, and `inner`'s noise passes through this gain."""
        if self.side != inner.side:
            raise ValueError(f"measurements of {self.side} and of {inner.side} voxels a side do not compose")
        return FourierOperator(
            self.gain * inner.gain, self.gain.square() * inner.noise_power + self.noise_power * self.mask
        )

    def __call__(self, volumes: Maps) -> Maps:
        """A x, the measurement without its noise."""
        return filtered(volumes, self.gain)

    def measure(self, volumes: Maps, generator: torch.Generator) -> Maps:
        """y = A x + n, with other noise for every map."""
        power = (self.noise_power * self.mask).to(volumes.dtype)
        return self(volumes) + shaped_noise(power.expand(*volumes.shape[:-3], *power.shape[-3:]), self.side, generator)

    def misfit(self, volumes: Maps, measured: Maps, spread: float | Tensor = 0.0) -> Float[Tensor, "*batch"]:
        """1/2 sum |F(A x - y)|^2 / (S + spread N^3 gain^2) over the measured voxels of the whole spectrum, per map.

        With `spread` 0 this is -log p(y | x) without its constant; a variance of x per voxel widens it (pigdm).
        """
        power = self.noise_power + spread * self.side**3 * self.gain.square()
        weight = torch.where(self.mask, multiplicity(self.side, self.gain.device) / power, 0.0)
        seen = transform(volumes)
        residual = self.gain.to(seen.real.dtype) * seen - transform(measured)
        squared = residual.real.square() + residual.imag.square()
        return 0.5 * (squared * weight.to(squared.dtype)).sum((-3, -2, -1))

    def replaced(self, volumes: Maps, measured: Maps) -> Maps:
        """The map with its measured voxels as measured, F^-1[M F(y)/gain + (1 - M) F(x)]: hard data consistency."""
        spectra = transform(volumes)
        gain = torch.where(self.mask, self.gain, 1.0).to(spectra.real.dtype)
        return inverse(torch.where(self.mask, transform(measured) / gain, spectra), self.side).to(volumes.dtype)

    def standardised(self, measured: Maps, shift: float, scale: float) -> "tuple[Maps, FourierOperator]":
        """Measurement and operator for z = (x - shift) / scale: y_z = (y - A shift) / scale, S_z = S / scale^2.

        A constant only has a zero frequency, so y is shifted by gain(0) shift.
        """
        offset = float(self.gain[0, 0, 0]) * shift
        return (measured - offset) / scale, replace(self, noise_power=self.noise_power / scale**2)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "FourierOperator":
        """The same on another device, or in another precision."""
        return FourierOperator(self.gain.to(device, dtype), self.noise_power.to(device, dtype))


# Single-particle maps: noise by shell


def spectral_noise(power: Float[Tensor, "*batch shells"], side: int) -> FourierOperator:
    """Every voxel is measured, with noise of this power in every shell 0..N/2; corners get the last shell's."""
    noise = on_shells(power.double(), side)
    return FourierOperator(torch.ones_like(noise[(0,) * (noise.ndim - 3)]), noise)


def anisotropic_noise(power: Float[Tensor, "*batch shells"], amplification: Half) -> FourierOperator:
    """Noise with this mean power by shell, shared within a shell as `amplification` says.

    S(k) = S(|k|) count(|k|) m(k) / sum of m over the shell: uneven orientations leave some directions noisier, while
    the radial spectrum, which is what half maps show, stays.
    """
    side = amplification.shape[0]
    relative = amplification / on_shells(shell_mean(amplification, side), side)
    return FourierOperator(torch.ones_like(relative), on_shells(power.double(), side) * relative)


def amplified(side: int, tilt: float, times: float = 50.0, axis: Axis = "y", beam: Axis = "z") -> Half:
    """m(k): 1 where |angle to the sample plane| <= tilt degrees, and `times` in the wedge around the beam."""
    return torch.where(tilted(side, tilt, axis, beam), 1.0, times).double()


@dataclass(frozen=True)
class Spectra:
    """What two half maps say about one of them: power by shell of signal and of noise, and their correlation."""

    correlation: Curve
    signal: Curve
    noise: Curve

    @property
    def data_weight(self) -> Tensor:
        """1 / (1 + S / P): the part of a shell that comes from the data when the prior has the signal's power."""
        return self.signal / (self.signal + self.noise)

    @property
    def of_mean(self) -> "Spectra":
        """The same for the mean of both half maps, whose noise is half as strong."""
        return Spectra(to_truth(self.correlation), self.signal, self.noise / 2)

    def on(self, side: int, coarser: float = 1.0) -> "Spectra":
        """The same for cubes of `side` voxels cut from these maps, of voxels that are `coarser` times as wide.

        E|F n|^2 grows with the number of voxels, and falls with the band that is left of white noise.
        """
        here = 2 * (len(self.noise) - 1)
        share = (side / here / coarser) ** 3
        where = torch.arange(side // 2 + 1, dtype=self.noise.dtype) * here / (side * coarser)
        correlation, signal, noise = (_read_at(curve, where) for curve in (self.correlation, self.signal, self.noise))
        return Spectra(correlation, signal * share, noise * share)


def _read_at(curve: Float[Tensor, " shells"], where: Float[Tensor, " others"]) -> Float[Tensor, " others"]:
    """A curve between its shells, linearly; its last value beyond them."""
    where = where.clamp(max=len(curve) - 1)
    below = where.floor().long().clamp(max=len(curve) - 2)
    return torch.lerp(curve[below], curve[below + 1], where - below)


def estimated(
    first: Maps, second: Maps, seen: Half | None = None, filled: float = 1.0, smallest: float = 1e-9
) -> Spectra:
    """Signal and noise from two half maps: SNR = F / (1 - F), S = P_y / (1 + SNR), signal = P_y - S.

    P_y is the mean of the halves' spectra over the measured voxels `seen` of the half spectrum, by default all; an FSC
    of zero or below counts as the SNR `smallest`. Where the maps are zero in all but a part `filled` of the box, noise
    there is 1 / `filled` times as strong as in the mean. Shell 0 is a single number, which correlates with any other
    one entirely: it has the ratio of shell 1.
    """
    correlation = fsc(first, second)
    correlation[..., 0] = correlation[..., 1]
    ratio = signal_to_noise(correlation, smallest)
    measured = (power_spectrum(first) + power_spectrum(second)) / 2
    if seen is not None:
        measured = measured / shell_mean(seen.double(), first.shape[-1])
    noise = measured / (1 + ratio)
    return Spectra(correlation, measured - noise, noise / filled)


def noise_for(truth: Maps, correlation: Float[Tensor, " shells"]) -> Curve:
    """The noise power S = P / SNR at which half maps of `truth` have this FSC; SNR is at least 1e-3."""
    return power_spectrum(truth) / signal_to_noise(correlation.double())


def logistic_fsc(side: int, falls_at: float = 5.0) -> Curve:
    """F(s) = sigmoid(falls_at - s) within [1e-3, 1 - 1e-6]: a plausible half-map curve for simulated data."""
    shells = torch.arange(side // 2 + 1, dtype=torch.float64)
    return torch.sigmoid(falls_at - shells).clamp(1e-3, 1 - 1e-6)


# Tomograms: a missing wedge


def tilted(side: int, tilt: float, axis: Axis = "y", beam: Axis = "z") -> Tensor:
    """Whether a voxel of the half spectrum is seen by a tilt series of +-`tilt` degrees around `axis`.

    Kept where atan2(|k_v|, |k_h|) <= tilt, k_v along the beam and k_h along the third axis; the centre is kept.
    """
    if axis == beam:
        raise ValueError(f"the tilt axis ({axis}) is one of the two that are not along the beam ({beam})")
    if not 0 < tilt <= 90:
        raise ValueError(f"tilt={tilt} is the largest tilt in degrees, above 0 and at most 90")
    across = next(name for name in AXES if name not in (axis, beam))
    waves = wave_vectors(side)
    vertical, horizontal = waves[AXES[beam]].abs(), waves[AXES[across]].abs()
    # an angle of exactly the largest tilt is kept, which rounding must not decide
    return (torch.atan2(vertical, horizontal) <= math.radians(tilt) + 1e-9).expand(side, side, side // 2 + 1)


def missing_wedge(side: int, tilt: float, axis: Axis = "y", beam: Axis = "z") -> FourierOperator:
    """What a tilt series of +-`tilt` degrees measures of a volume, without noise: about tilt / 90 of its voxels."""
    gain = tilted(side, tilt, axis, beam).double()
    return FourierOperator(gain, torch.zeros_like(gain))


# Experimental: projections along known directions


@dataclass(frozen=True)
class Microscope:
    """The contrast transfer function of weak phase objects; lengths in angstroms, `voltage` in kV, `cs` in mm."""

    defocus: float = 15000.0
    voltage: float = 300.0
    cs: float = 2.7
    amplitude: float = 0.1

    def ctf(self, frequency: Tensor) -> Tensor:
        """-sin(pi lambda k^2 (defocus - C_s lambda^2 k^2 / 2) + asin(amplitude)), k in 1 / angstrom."""
        volts = self.voltage * 1e3
        wavelength = 12.2643 / math.sqrt(volts + 0.97845e-6 * volts**2)
        squared = frequency.square()
        spherical = 0.5 * self.cs * 1e7 * wavelength**2 * squared
        return -torch.sin(math.pi * wavelength * squared * (self.defocus - spherical) + math.asin(self.amplitude))


@dataclass(frozen=True)
class Projections:
    """Experimental: y_i = F^-1 [ CTF slice_i(F x) ] + white noise, along known directions (Fourier slice theorem).

    The slice perpendicular to a direction is read by trilinear interpolation from the transform of the volume padded
    to twice its side. `rotations` turn the volume's (x, y, z) before it is projected along z; `noise_variance` is a
    pixel's. Unknown directions are another problem, which is not solved here.
    """

    rotations: Float[Tensor, "image 3 3"]
    noise_variance: float
    voxel_size: float
    microscope: Microscope = Microscope()

    def __call__(self, volumes: Float[Tensor, "*batch n n n"]) -> Float[Tensor, "*batch image n n"]:
        """The projections without noise."""
        side = volumes.shape[-1]
        slices = torch.stack([_slice(volumes, rotation) for rotation in self.rotations.to(volumes)], -3)
        k = torch.fft.fftfreq(side, self.voxel_size, device=volumes.device, dtype=volumes.dtype)
        ctf = self.microscope.ctf((k[:, None].square() + k.square()).sqrt())
        images = torch.fft.ifftn(slices * ctf, dim=(-2, -1)).real
        return torch.fft.fftshift(images, dim=(-2, -1))

    def measure(self, volumes: Tensor, generator: torch.Generator) -> Tensor:
        """Projections with noise."""
        clean = self(volumes)
        white = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        return clean + math.sqrt(self.noise_variance) * white

    def misfit(self, volumes: Tensor, measured: Tensor, spread: float | Tensor = 0.0) -> Tensor:
        """1/2 sum (A x - y)^2 / variance over all pixels; the spread of a slice is not known in closed form."""
        if not isinstance(spread, float) or spread:
            raise ValueError("projections have no closed variance for guidance=pigdm: take guidance=normalised")
        return 0.5 * (self(volumes) - measured).square().sum((-3, -2, -1)) / self.noise_variance

    def standardised(self, measured: Tensor, shift: float, scale: float) -> "tuple[Tensor, Projections]":
        """Measurement and operator for z = (x - shift) / scale; a constant volume is projected like any other."""
        side = measured.shape[-1]
        constant = self(torch.full((side,) * 3, shift, device=measured.device, dtype=measured.dtype))
        return (measured - constant) / scale, replace(self, noise_variance=self.noise_variance / scale**2)


def _slice(volumes: Float[Tensor, "*batch n n n"], rotation: Float[Tensor, "3 3"]) -> Tensor:
    """The central slice of a volume's transform whose normal is the rotated z axis, in FFT order, centre at n // 2."""
    side, batch = volumes.shape[-1], volumes.shape[:-3]
    pad = side // 2
    padded = F.pad(volumes, (pad,) * 6)
    whole = padded.shape[-1]
    centred = torch.fft.ifftshift(padded, dim=(-3, -2, -1))  # the centre n // 2 is still the centre
    spectra = torch.fft.fftshift(torch.fft.fftn(centred, dim=(-3, -2, -1)), dim=(-3, -2, -1))
    line = torch.fft.fftfreq(side, 1 / whole, device=volumes.device, dtype=volumes.dtype)
    ky, kx = torch.meshgrid(line, line, indexing="ij")
    plane = torch.stack([kx, ky, torch.zeros_like(kx)], -1) @ rotation  # R^T k, as (x, y, z) for grid_sample
    places = 2 * (plane + whole // 2) / (whole - 1) - 1
    both = torch.stack([spectra.real, spectra.imag], -4).reshape(-1, 2, *spectra.shape[-3:])
    grid = places[None, None].expand(both.shape[0], -1, -1, -1, -1)
    found = F.grid_sample(both, grid, mode="bilinear", align_corners=True)[:, :, 0]
    return torch.complex(found[:, 0], found[:, 1]).reshape(*batch, side, side)
