"""Samplers and guidances of a restoration: `PYTHONPATH=$PWD python benchmarks/cryo_sampling.py <run>/export`.

Simulated held-out maps are measured with noise by shell and restored by every sampler from the same noise, in turn for
every map, so that differences are paired. Printed: FSC-AUC, its difference to the first sampler with the standard error
over maps, in how many maps it is at least as good, evaluations of the network for one restoration (counted), and
CPU seconds; on a GPU also the most memory that a restoration took. `--kappa` may be several.
"""

import argparse
import importlib.metadata
import time
from collections import Counter
from pathlib import Path

import torch

from datamodules.simulated_maps import bundle_maps
from lightning_modules.cryo import prior as priors
from lightning_modules.cryo.posterior import Normalised, PiGDM
from lightning_modules.cryo.tasks import Denoise, Task, Trials, Wedge
from lightning_modules.processes import ode

TASKS: dict[str, Task] = {"denoise": Denoise(), "wedge": Wedge()}
SAMPLERS = {
    "euler, 200 steps": (ode.Euler(), 200),
    "euler, 50 steps": (ode.Euler(), 50),
    "euler, 25 steps": (ode.Euler(), 25),
    "heun, 12 steps": (ode.Heun(), 12),
    "midpoint, 12 steps": (ode.Midpoint(), 12),
    "dpmpp_2m, 25 steps": (ode.DPMpp2M(), 25),
    "dpm2, 13 steps": (ode.DPM2(), 13),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prior", type=Path)
    parser.add_argument("--task", choices=TASKS, default="denoise")
    parser.add_argument("--guidance", choices=("normalised", "pigdm"), default="normalised")
    parser.add_argument("--kappa", type=float, nargs="+", default=[1.0])
    parser.add_argument("--maps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS), help="beginnings of their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prior = priors.load(args.prior)
    maps = bundle_maps("test", args.maps, prior.box, prior.voxel_size, 8.0, args.seed)
    truths = torch.stack([torch.from_numpy(volume.density) for volume in maps]).to(args.device)
    prior.network.to(args.device)
    print(f"{len(truths)} simulated maps of {prior.box}^3, {args.task}, torch {importlib.metadata.version('torch')}")
    wanted = {name: of for name, of in SAMPLERS.items() if name.startswith(tuple(args.samplers))}
    for kappa in args.kappa if args.guidance == "normalised" else [0.0]:
        guidance = Normalised(kappa) if kappa else PiGDM()
        report(wanted, guidance, args, prior, truths, f"{args.guidance} {kappa or ''}")
    if truths.is_cuda:
        print(f"\nat most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, {args.batch} maps at once")


def report(wanted: dict, guidance, args: argparse.Namespace, prior, truths: torch.Tensor, title: str) -> None:
    """A table; all samplers restore a batch of maps before the next one."""
    scores = {name: [] for name in wanted}
    seconds, evaluated, simple = dict.fromkeys(wanted, 0.0), Counter(), {}
    current = ""
    counter = prior.network.register_forward_hook(lambda *_: evaluated.update([current]))
    for start in range(0, len(truths), args.batch):
        places = list(range(start, min(start + args.batch, len(truths))))
        for name, (sampler, steps) in wanted.items():
            trials = Trials({args.task: TASKS[args.task]}, guidance, sampler, steps)
            current, began = name, time.process_time()
            trial = trials(args.task, prior.prediction, (prior.mean, prior.std), truths[places], places, args.seed)
            seconds[name] += time.process_time() - began
            scores[name].append(trial.scores["restored"])
        for kind, found in trial.scores.items():
            if kind != "restored":
                simple.setdefault(kind, []).append(found)
    counter.remove()
    restorations = 2 * -(-len(truths) // args.batch) if args.task == "denoise" else -(-len(truths) // args.batch)
    print(f"\n{title}\n\n| | evaluations | FSC-AUC | against the first | as good in | lowest | CPU-s |")
    print("|---|---|---|---|---|---|---|")
    first = torch.cat(next(iter(scores.values())))
    for name, parts in scores.items():
        found = torch.cat(parts)
        apart = found - first
        error = apart.std() / len(apart) ** 0.5
        print(
            f"| {name} | {evaluated[name] // restorations} | {found.mean():.4f} | {apart.mean():+.4f} +- {error:.4f} "
            f"| {int((apart >= 0).sum())} of {len(apart)} | {found.min():.3f} | {seconds[name]:.0f} |",
            flush=True,
        )
    for kind, parts in simple.items():
        print(f"| {kind.replace('_', ' ')} | | {torch.cat(parts).mean():.4f} | | | {torch.cat(parts).min():.3f} | |")


if __name__ == "__main__":
    main()
