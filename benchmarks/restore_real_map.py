"""Half maps made from a real map, and restored.

    PYTHONPATH=$PWD python benchmarks/restore_real_map.py emd_3488.map.gz --prior <run>/export draws=2

No deposited half maps are at hand, so two are made here: the map plus independent noise whose spectrum gives the halves
a measured FSC curve (that of a 6.1 A reconstruction, published with CryoFM's benchmark). The map is the truth then,
which it is not: it has noise of its own. Restored by `tools.restore_map`, compared with their mean and a soft mask.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from datamodules.mrc import read_map, save_map
from datamodules.regridding import band_limited, cubic_edge, on_cube, padded
from lightning_modules.cryo import prior as priors
from lightning_modules.cryo.baselines import soft_masked
from lightning_modules.cryo.fourier import auc, fsc, resolution
from lightning_modules.cryo.map_figures import fsc_curves, written
from lightning_modules.cryo.operators import noise_for, spectral_noise
from lightning_modules.cryo.restoration import seeded
from tools import restore_map

# FSC of half maps at 4, 8, ... 28 shells of 1/96 A (arXiv 2410.08631, demonstration data), and 1 in the first
MEASURED = {0: 0.999, 4: 0.993, 8: 0.880, 12: 0.510, 16: 0.131, 20: 0.044, 24: 0.0, 28: 0.0}


def curve(side: int, voxel_size: float) -> torch.Tensor:
    """The measured FSC at the shells of a box, linearly between what is known."""
    frequency = np.arange(side // 2 + 1) / (side * voxel_size)
    return torch.from_numpy(np.interp(frequency * 96, list(MEASURED), list(MEASURED.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("map", type=Path)
    parser.add_argument("--prior", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("restored"))
    parser.add_argument("words", nargs="*", help="words for tools.restore_map")
    args = parser.parse_intermixed_args()
    args.output.mkdir(exist_ok=True)
    truth = read_map(args.map)
    halves = made(truth, args.output)
    out = args.output / "restored.mrc"
    if restore_map.main([*map(str, halves), "-o", str(out), "--prior", str(args.prior), *args.words]):
        raise SystemExit(1)
    compare(truth, halves, out, priors.load(args.prior).voxel_size)


def made(truth, folder: Path) -> list[Path]:
    """Two half maps, in files."""
    side = cubic_edge(truth.voxels.shape)
    volume = torch.from_numpy(padded(truth.voxels, side))
    noise = spectral_noise(noise_for(volume, curve(side, truth.voxel_size)), side)
    paths = [folder / "half1.mrc", folder / "half2.mrc"]
    for path, half in zip(paths, noise.measure(volume.expand(2, -1, -1, -1), seeded(0))):
        save_map(path, replace(truth, voxels=padded(half.numpy(), truth.voxels.shape), warnings=()))
    return paths


def compare(truth, halves: list[Path], out: Path, voxel_size: float) -> None:
    """FSC with the map that the halves were made from, on the prior's grid, to its Nyquist frequency."""
    first, second = (read_map(path) for path in halves)
    mean = replace(first, voxels=(first.voxels + second.voxels) / 2)
    maps = {"observed": mean, "restored": read_map(out), "half 1": first, "half 2": second}
    maps["truth"] = truth
    coarse = {name: on_cube(band_limited(record, voxel_size), voxel_size) for name, record in maps.items()}
    cubes = {name: torch.from_numpy(record.voxels) for name, record in coarse.items()}
    cubes["soft mask"] = soft_masked(cubes["observed"], fsc(cubes["half 1"], cubes["half 2"]))
    between = fsc(cubes["half 1"], cubes["half 2"])
    curves = {name: fsc(cubes[name], cubes["truth"]) for name in ("observed", "soft mask", "restored")}
    side, size = cubes["truth"].shape[-1], coarse["truth"].voxel_size
    met = written(resolution(between, side, size))
    print(f"half maps with each other: FSC-AUC {float(auc(between)):.4f}, 0.143 at {met}")
    for name, curve in curves.items():
        met = written(resolution(curve, side, size, 0.5))
        print(f"{name}: FSC-AUC {float(auc(curve)):.4f}, 0.5 at {met}")
    shells = ", ".join(f"{side * size / shell:.1f}" for shell in range(1, side // 2 + 1))
    print(f"shells of {shells} A:")
    for name, curve in {"half maps": between, **curves}.items():
        print(f"  {name}: " + " ".join(f"{value:.2f}" for value in curve[1:].tolist()))
    figure = fsc_curves({name.replace(" ", "_"): curve for name, curve in curves.items()}, side, size, truth.path.name)
    figure.savefig(out.with_name("with_the_truth.png"), dpi=160)


if __name__ == "__main__":
    main()
