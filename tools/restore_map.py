"""Restores a cryo-EM density from its two half maps with a prior, and says how much of every shell is data.

    python -m tools.restore_map half1.mrc half2.mrc -o out.mrc --prior outputs/cryofm/emdb/<run>/export
    python -m tools.restore_map half1.mrc half2.mrc -o out.mrc --prior ... task=wedge tilt=60 draws=8

Half maps are unmasked and unsharpened. The noise is read off their Fourier shell correlation, the prior does the rest;
nothing of what it adds is measured. Beside out.mrc (the mean of all draws) are out_std.mrc (their standard deviation),
out_fsc.png, out_maps.png and out.txt. Interrupted? The same command goes on.

words, each with its default:
  task=denoise     denoise | anisotropic (noise `times` stronger out of the sample plane) | wedge (a tilt series)
  tilt=60          degrees: the largest tilt of a wedge, or what is not noisier of anisotropic
  times=50         how much stronger anisotropic noise is beyond `tilt`
  axis=y, beam=z   the tilt axis and the direction of the beam
  guidance=normalised  normalised | pigdm (exact for Gaussian data)
  kappa=1          strength of normalised guidance; the paper's 1000 steps are 1.953
  sampler=dpmpp_2m steps=100   any word of conf/sampler; 25 steps for a first look
  draws=4          restorations that mean and standard deviation are taken over
  overlap=0.5      of neighbouring tiles, which have the size of the prior's cubes
  batch=4          tiles at once
  scale=auto       density that counts as 1; auto: a high percentile of the Wiener-filtered mean
  percentile=99.999  the one that was used in training (data.percentile)
  voxel_size=auto  angstrom, in the place of what the headers say
  seed=0, device=cpu
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import Float, Float64
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.map_entries import check_same_grid
from datamodules.map_processing import scale_of
from datamodules.mrc import MapFormatError, MapRecord, Remedy, available_memory, read_map, save_map
from datamodules.regridding import back_from_cube, band_limited, cubic_edge, on_cube, padded
from lightning_modules.cryo import prior as priors
from lightning_modules.cryo.baselines import wiener
from lightning_modules.cryo.fourier import low_pass, resolution, to_truth
from lightning_modules.cryo.map_figures import beside, half_map_report, written
from lightning_modules.cryo.operators import (
    FourierOperator,
    Spectra,
    amplified,
    anisotropic_noise,
    estimated,
    missing_wedge,
    spectral_noise,
)
from lightning_modules.cryo.posterior import Guidance, Normalised, PiGDM
from lightning_modules.cryo.restoration import Restoration, State
from lightning_modules.cryo.tiling import Tiling
from lightning_modules.processes.prediction import Prediction
from tessera.compose import CONF

TASKS = ("denoise", "anisotropic", "wedge")
SAVED_EVERY = 20.0  # seconds
REMEDIES = {
    Remedy.VOXEL_SIZE: "set it in the header, or give voxel_size",
    Remedy.CUBES: "resample it to cubes first",
    Remedy.ZEROS: "write 0 or the density that belongs there",
    Remedy.FINER: "it needs a prior with finer voxels",
    Remedy.OTHER_GRID: "it needs a prior with other voxels",
}
NOTES = (
    "Where the weight is near 0 what is seen comes from the prior: it may be invented, however sharp it looks.",
    "Where draws differ (_std.mrc) nothing is certain; where they agree the prior may still be wrong.",
    "The FSC above is that of the half maps as given. No resolution may be claimed for the restored map: both halves",
    "would be restored with one prior and one noise spectrum, and agree by that alone.",
)


@dataclass(frozen=True)
class Settings:
    """The words of the command line."""

    task: str = "denoise"
    tilt: float = 60.0
    times: float = 50.0
    axis: str = "y"
    beam: str = "z"
    guidance: str = "normalised"
    kappa: float = 1.0
    sampler: str = "dpmpp_2m"
    steps: int = 100  # 25 cost 0.09 to 0.12 of FSC-AUC on a real map (docs/restoration.md)
    draws: int = 4
    overlap: float = 0.5
    batch: int = 4
    scale: str = "auto"
    percentile: float = 99.999
    voxel_size: str = "auto"
    seed: int = 0
    device: str = "cpu"

    @classmethod
    def of(cls, words: Sequence[str]) -> "Settings":
        """From `name=value`. Raises ValueError for an unknown name or a value of another kind."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        given = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in kinds:
                raise ValueError(f"{word}: words are name=value, with {', '.join(kinds)}")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                kind = {int: "a whole number", float: "a number"}[kinds[name]]
                raise ValueError(f"{word}: {name} is {kind}, such as {name}={getattr(cls, name)}") from None
        settings = cls(**given)
        settings.check()
        return settings

    def check(self) -> None:
        """ValueError for what has no meaning."""
        known = {"task": TASKS, "guidance": ("normalised", "pigdm"), "axis": ("x", "y", "z"), "beam": ("x", "y", "z")}
        known["sampler"] = tuple(sorted(path.stem for path in (CONF / "sampler").glob("*.yaml")))
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)}: there are {', '.join(values)}")
        for name in ("steps", "draws", "batch", "kappa", "times", "percentile"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("scale", "voxel_size"):
            if getattr(self, name) != "auto" and not self.number(name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, or auto")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap} is a part of a tile, at least 0 and below 1")
        if self.task != "denoise":
            missing_wedge(4, self.tilt, self.axis, self.beam)  # refuses its angle and axes in a sentence

    def number(self, name: str) -> float | None:
        """A number that may also be auto, which is None."""
        value = getattr(self, name)
        try:
            return None if value == "auto" else float(value)
        except ValueError:
            raise ValueError(f"{name}={value} is neither a number nor auto") from None

    def operator(self, power: Tensor, side: int) -> FourierOperator:
        """What a half map with this noise power by shell is."""
        if self.task == "anisotropic":
            return anisotropic_noise(power, amplified(side, self.tilt, self.times, self.axis, self.beam))
        noise = spectral_noise(power, side)
        return self.wedge(side) @ noise if self.task == "wedge" else noise

    def wedge(self, side: int) -> FourierOperator:
        return missing_wedge(side, self.tilt, self.axis, self.beam)

    def guide(self) -> Guidance:
        return Normalised(self.kappa) if self.guidance == "normalised" else PiGDM()


@dataclass(frozen=True)
class Halves:
    """Two half maps: as they were, on the prior's grid (`volumes`), what they say, and the density that counts as 1."""

    records: tuple[MapRecord, MapRecord]
    cube: MapRecord
    volumes: Float[Tensor, "2 n n n"]
    spectra: Spectra
    scale: float
    grid: float  # the prior's voxel size, which `cube` has as nearly as its box allows

    @property
    def side(self) -> int:
        return self.volumes.shape[-1]

    @property
    def coarser(self) -> float:
        """How much wider the voxels of the prior's grid are."""
        return self.cube.voxel_size / self.records[0].voxel_size

    @property
    def filtered(self) -> MapRecord:
        """The mean of both halves, every shell times its weight of the data, up to the first with FSC <= 0.143."""
        first, second = self.records
        side = cubic_edge(first.voxels.shape)
        mean = torch.from_numpy(padded((first.voxels + second.voxels) / 2, side))
        kept = (self.spectra.correlation > 0.143).double().cumprod(0)
        return replace(first, voxels=padded(wiener(mean, kept * data_weight(self.spectra)).numpy(), first.voxels.shape))


def data_weight(spectra: Spectra) -> Float64[Tensor, " shells"]:
    """The part of every shell of the mean that comes from the data: 1 / (1 + S / 2P) = 2 F / (1 + F)."""
    return to_truth(spectra.correlation.nan_to_num()).square()


def read_halves(paths: Sequence[Path], prior: priors.DensityPrior, settings: Settings) -> Halves:
    """Read, compare and regrid two half maps. Raises an error in one sentence for what cannot be restored."""
    first, second = (read_map(path, voxel_size=settings.number("voxel_size")) for path in paths)
    for record in (first, second):
        for warning in record.warnings:
            print(f"warning: {record.path}: {warning}", file=sys.stderr)
    check_same_grid(first, second)
    if np.array_equal(first.voxels, second.voxels):
        raise ValueError(f"{paths[0]} and {paths[1]} are the same map: noise is read off the difference of half maps")
    spectra = spectra_of(first, second, settings)
    cubes = [on_cube(band_limited(record, prior.voxel_size), prior.voxel_size) for record in (first, second)]
    side = max(len(cubes[0].voxels), prior.box)
    volumes = torch.from_numpy(np.stack([padded(cube.voxels, side) for cube in cubes]))
    if settings.task == "wedge":
        volumes = settings.wedge(side)(volumes)
    halves = Halves((first, second), cubes[0], volumes, spectra, 1.0, prior.voxel_size)
    coarse = on_cube(halves.filtered, prior.voxel_size).voxels
    return replace(halves, scale=settings.number("scale") or scale_of(coarse, settings.percentile, paths[0]))


def spectra_of(first: MapRecord, second: MapRecord, settings: Settings) -> Spectra:
    """Signal and noise by shell, on the grid of the half maps; where both are zero, outside of a mask, is no noise."""
    side = cubic_edge(first.voxels.shape)
    volumes = [torch.from_numpy(padded(record.voxels, side)) for record in (first, second)]
    filled = float(((volumes[0] != 0) | (volumes[1] != 0)).double().mean())
    if settings.task != "wedge":
        return estimated(*volumes, filled=filled)
    wedge = settings.wedge(side)
    return estimated(*(wedge(volume) for volume in volumes), wedge.gain, filled)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 1 with a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.restore_map", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("halves", nargs=2, type=Path, metavar="half.mrc", help="half maps, also .gz or .bz2")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="out.mrc", help="the restored map")
    parser.add_argument("--prior", required=True, type=Path, metavar="export", help="export folder of model=cryofm")
    parser.add_argument("words", nargs="*", metavar="name=value", help="see above")
    options = parser.parse_intermixed_args(words)
    try:
        _check_output(options.output)
        settings = Settings.of(options.words)
        prior = priors.load(options.prior)
        halves = read_halves(options.halves, prior, settings)
        restore(halves, prior, settings, options.output, _identity(options, settings))
    except (ValueError, OSError, MemoryError) as error:
        told = error.told(REMEDIES) if isinstance(error, MapFormatError) else str(error)
        print(f"error: {' '.join(told.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def restore(halves: Halves, prior: priors.DensityPrior, settings: Settings, output: Path, identity: str) -> None:
    """Restore, and write everything that is left behind."""
    console = Console(stderr=True, highlight=False)
    prior.network.to(settings.device)
    tiling = Tiling(halves.side, prior.box, int(settings.overlap * prior.box))
    sampler = instantiate(OmegaConf.load(CONF / "sampler" / f"{settings.sampler}.yaml"))
    times = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64)
    job = Restoration(
        prior.prediction, settings.guide(), sampler, times, tiling, settings.draws, settings.batch, settings.seed
    )
    console.print(plan(halves, prior, job, settings), soft_wrap=True)
    operator = settings.operator(halves.spectra.on(prior.box, halves.coarser).noise, prior.box)
    units = prior.mean * halves.scale, prior.std * halves.scale
    measured, inner = operator.standardised(halves.volumes, *units)
    state = run(job, inner.to(settings.device, torch.float32), measured.to(settings.device), output, identity, console)
    mean, deviation = densities(state, units, halves)
    save_map(output, mean)
    save_map(_beside(output, "_std.mrc"), deviation)
    draw_figures(halves, mean, deviation, output)
    text = report(halves, prior, job, settings, output)
    _beside(output, ".txt").write_text(text)
    _partial(output, identity).unlink(missing_ok=True)
    console.print(text, soft_wrap=True)


def plan(halves: Halves, prior: priors.DensityPrior, job: Restoration, settings: Settings) -> str:
    """What will be done and the memory it takes. Raises MemoryError where there is too little."""
    tiles, record = len(job.tiling.corners), halves.records[0]
    at_once = min(job.batch, tiles)
    needed = at_once * activations(job.prior, prior.box, settings.device) + 10 * 8 * halves.side**3
    free = available_memory() if settings.device == "cpu" else torch.cuda.mem_get_info(settings.device)[0]
    if needed > free:
        raise MemoryError(
            f"{at_once} tiles of {prior.box}^3 voxels at once take about {needed / 1e9:.1f} GB and {free / 1e9:.1f} "
            f"are free: lower batch={job.batch}"
        )
    shape = " x ".join(map(str, record.voxels.shape[::-1]))
    evaluations = len(job.batches(2)) * (len(job.grid) - 1) * job.sampler.evaluations
    return (
        f"{shape} voxels of {record.voxel_size:.4g} A, {halves.side}^3 of {halves.cube.voxel_size:.4g} for the prior; "
        f"{tiles} tiles of {prior.box}^3, {job.draws} draws of both halves, {evaluations:,} evaluations of {at_once} "
        f"tiles, about {needed / 1e9:.2f} of {free / 1e9:.1f} GB of memory"
    )


def activations(prior: Prediction, box: int, device: str) -> int:
    """Bytes that a gradient through the network keeps of one cube, counted in one evaluation."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(1, box, box, box, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        prior.velocity(x, torch.tensor(0.5))
    return sum(kept.values())


def run(
    job: Restoration, operator: FourierOperator, measured: Tensor, output: Path, identity: str, console: Console
) -> State:
    """Restore with a progress bar, keeping what is done every few seconds; goes on from what was kept."""
    partial, total = _partial(output, identity), len(job.batches(2))
    state = _kept(partial) if partial.exists() else State.begin(job.tiling.side)
    if state.done:
        console.print(f"going on after {state.done} of {total} batches of tiles, from {partial}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("restoring", total=total, completed=state.done)
        steps = len(job.grid) - 1
        saved = time.monotonic()
        for _ in job(operator, measured, state, lambda *_: bar.advance(task, 1 / steps)):
            bar.update(task, completed=state.done)
            if time.monotonic() - saved > SAVED_EVERY:
                _keep(partial, state)
                saved = time.monotonic()
    _keep(partial, state)
    return state


def densities(state: State, units: tuple[float, float], halves: Halves) -> tuple[MapRecord, MapRecord]:
    """Mean and standard deviation over the draws as densities, on the grid of the half maps and in their place.

    What is finer than the prior's voxels was not restored: there the mean is the filtered mean of the half maps.
    """
    shift, scale = units
    original, observed = halves.records[0], halves.filtered

    def back(volume: Tensor) -> np.ndarray:
        cube = replace(halves.cube, voxels=padded(volume.float().numpy(), len(halves.cube.voxels)))
        return back_from_cube(cube, original, halves.grid).voxels

    coarse = back_from_cube(on_cube(observed, halves.grid), original, halves.grid).voxels
    mean = back(state.mean * scale + shift) + observed.voxels - coarse
    deviation = back(state.deviation * scale).clip(min=0)
    return replace(original, voxels=mean, warnings=()), replace(original, voxels=deviation, warnings=())


def draw_figures(halves: Halves, mean: MapRecord, deviation: MapRecord, output: Path) -> None:
    """The FSC of the half maps, and what was observed and restored beside each other."""
    first, second = halves.records
    side, size, reach = cubic_edge(first.voxels.shape), first.voxel_size, halves.cube.voxel_size
    given = {"half map": first.voxels, "mean of halves": (first.voxels + second.voxels) / 2}
    made = {"filtered": halves.filtered.voxels, "restored": mean.voxels, "deviation": deviation.voxels}
    volumes = {name: torch.from_numpy(padded(voxels, side)) for name, voxels in (given | made).items()}
    # noise beyond what is restored would hide everything
    volumes |= {name: low_pass(volumes[name], 2 * max(reach, size), size) for name in given}
    title = f"{output.name}; half maps and their mean to {2 * max(reach, size):.2g} A"
    curves = half_map_report(halves.spectra.correlation, data_weight(halves.spectra), side, size, reach)
    for figure, ending in ((curves, "_fsc.png"), (beside(volumes, title), "_maps.png")):
        figure.savefig(_beside(output, ending), dpi=160)
        plt.close(figure)


def report(halves: Halves, prior: priors.DensityPrior, job: Restoration, settings: Settings, output: Path) -> str:
    """What was done, and for every shell the resolution, FSC, signal over noise, and the weight of the data."""
    first, second = halves.records
    side = cubic_edge(first.voxels.shape)
    spectra, weight = halves.spectra, data_weight(halves.spectra)
    found = resolution(spectra.correlation, side, first.voxel_size)
    said = "\n".join(f"  {name}={value}" for name, value in asdict(settings).items())
    lines = [
        f"{output} from {first.path} and {second.path}",
        f"half maps: FSC 0.143 at {written(found)}, unmasked; one counts as density {halves.scale:.6g}",
        f"prior: cubes of {prior.box}^3 voxels of {prior.voxel_size:g} A; "
        f"here {halves.side}^3 voxels of {halves.cube.voxel_size:.5g} A",
        f"settings:\n{said}",
        "",
        "What comes from the data and what from the prior, by shell of the half maps:",
        "  shell  resolution/A  FSC(half maps)  signal/noise  weight of the data in the mean",
    ]
    for shell in range(1, len(weight)):
        at = side * first.voxel_size / shell
        beyond = "  not restored" if at < 2 * halves.cube.voxel_size else ""
        ratio = float(spectra.signal[shell] / spectra.noise[shell])
        lines.append(
            f"  {shell:5d}  {at:12.2f}  {float(spectra.correlation[shell]):14.4f}  {ratio:12.4g}  "
            f"{float(weight[shell]):8.4f}{beyond}"
        )
    return "\n".join([*lines, "", *NOTES, ""])


# The files beside the output


def _beside(output: Path, ending: str) -> Path:
    """out.mrc -> out<ending>."""
    stem = output.name
    for suffix in (".gz", ".bz2", ".mrc", ".map", ".ccp4"):
        stem = stem.removesuffix(suffix)
    return output.with_name(stem + ending)


def _check_output(output: Path) -> None:
    if not any(name in output.suffixes for name in (".mrc", ".map", ".ccp4")):
        raise ValueError(f"--output {output}: a map's name ends in .mrc, .map or .ccp4")
    if output.is_dir() or not output.resolve().parent.is_dir():
        raise ValueError(f"--output {output}: its folder {output.resolve().parent} must exist")


def _identity(options: argparse.Namespace, settings: Settings) -> str:
    """A digest of everything that decides what is restored, so that only the same restoration goes on."""
    digest = hashlib.sha256(json.dumps({**asdict(settings), "device": None}, sort_keys=True).encode())
    for path in (*options.halves, *sorted(p for p in options.prior.iterdir() if p.is_file())):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _partial(output: Path, identity: str) -> Path:
    return output.with_name(f".{output.name}.{identity}.partial")


def _keep(path: Path, state: State) -> None:
    new = path.with_name(f"{path.name}.new")
    save_file(state.tensors(), new)
    os.replace(new, path)


def _kept(path: Path) -> State:
    try:
        return State.of(load_file(path))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, the restoration then begins anew") from error


if __name__ == "__main__":
    sys.exit(main())
