"""What a step of an optimizer costs: `python benchmarks/optimizer_step.py [--device cuda --parameters 124e6]`.

The tensors are those of a GPT-2 of about as many parameters; gradients are random and stay. The optimizers step in turn
in one process. Printed are medians with the 10th and 90th percentile, and the ratio to torch's fused AdamW. Public
packages' MARS (pytorch-optimizer, timm) are measured where they are installed.
"""

import argparse
import contextlib
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_modules.optimizers.mars import MARS
from lightning_modules.optimizers.parameter_free import AdaGradPP, AdamPP

LAYERS, VOCABULARY, CONTEXT = 12, 50304, 1024


def shapes(parameters: float) -> list[tuple[int, ...]]:
    """The tensors of a GPT-2 of twelve layers whose width makes about this many parameters, and their gains."""
    large = parameters > 50e6
    vocabulary, context = (VOCABULARY, CONTEXT) if large else (256, 256)

    def made(width: int) -> list[tuple[int, ...]]:
        block = [(width,), (3 * width, width), (width, width), (width,), (4 * width, width), (width, 4 * width)]
        return [(vocabulary, width), (context, width), *(LAYERS * block), (width,)]

    def count(width: int) -> int:
        return sum(torch.Size(shape).numel() for shape in made(width))

    return made(min(range(64, 2048, 8), key=lambda width: abs(count(width) - parameters)))


def public_mars() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """MARS as others package it, where it is installed."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    with contextlib.suppress(ImportError):
        import pytorch_optimizer

        version = importlib.metadata.version("pytorch-optimizer")
        found[f"MARS-AdamW, pytorch-optimizer {version}"] = pytorch_optimizer.MARS
    with contextlib.suppress(ImportError):
        import timm.optim

        found[f"MARS-AdamW, timm {importlib.metadata.version('timm')}"] = timm.optim.Mars
    return found


def contestants() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """How each optimizer is made from parameters; the first is what the others are compared with."""

    def muon(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
        return lambda parameters: make([p for p in parameters if p.ndim == 2])

    return {
        "AdamW, torch fused": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW, torch foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "MARS-AdamW, fused": lambda p: MARS(p, fused=True),
        "MARS-AdamW, foreach": lambda p: MARS(p, foreach=True),
        "MARS-AdamW, one by one": lambda p: MARS(p, foreach=False),
        "MARS-Lion, foreach": lambda p: MARS(p, algo="mars-lion"),
        "Adam++": AdamPP,
        "AdaGrad++": AdaGradPP,
        **public_mars(),
        "Muon, torch (matrices)": muon(torch.optim.Muon),
        "MARS-Shampoo (matrices)": muon(lambda p: MARS(p, algo="mars-shampoo")),
    }


def stepper(make: Callable[..., torch.optim.Optimizer], sizes: list[tuple[int, ...]], device: str):
    """A function that steps on parameters of its own and returns the seconds that this took."""
    parameters = [nn.Parameter(0.02 * torch.randn(size, device=device)) for size in sizes]
    for p in parameters:
        p.grad = 1e-3 * torch.randn_like(p)
    optimizer = make(parameters)

    def step() -> float:
        began = time.perf_counter()
        optimizer.step()
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parameters", type=float, default=7.1e6)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the names to measure, beside the first")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    sizes = shapes(given.parameters)
    made = contestants()
    first = next(iter(made))
    steps = {
        name: stepper(make, sizes, given.device) for name, make in made.items() if name == first or given.only in name
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(given.repeats + 3):
        for name, step in steps.items():
            taken = step()
            if repeat >= 3:
                seconds[name].append(taken)
    count = sum(torch.Size(size).numel() for size in sizes)
    print(
        f"{count:,} parameters in {len(sizes)} tensors, {given.device}, {given.threads} thread(s), {platform.machine()}"
    )
    print(f"torch {torch.__version__}, {given.repeats} repeats in turn; median [10 %, 90 %]")
    for name, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(times, seconds[first])]
        print(f"{name:<38} {_spread([1e3 * t for t in times])} ms   {_spread(ratios)} x {first}")


def _spread(values: list[float]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):8.2f} [{tenths[0]:.2f}, {tenths[-1]:.2f}]"


if __name__ == "__main__":
    main()
