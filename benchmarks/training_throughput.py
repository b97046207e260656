"""Tokens per second of a language model: our loop through Lightning beside a bare loop in the manner of nanoGPT.

python benchmarks/training_throughput.py
python benchmarks/training_throughput.py --words model=gpt2_small data.path=shards trainer=gpu data.batch_size=64 \
    trainer.precision=bf16-mixed model.compile=true

The same network, optimizer, schedule, clipping and batch size on both sides, interleaved in one process. The bare loop
draws random windows from the same tokens; ours has the loader, logs, progress lines and checks of a real run. Neither
validates or saves: what a save costs is measured in benchmarks/save.py.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn

from tessera import build
from tessera.compose import compose
from tessera.run import quiet

Moment = tuple[float, float]


class Stopwatch(Callback):
    """When each optimizer step ended: on the wall's clock, and in the processor's time that this process has had."""

    def __init__(self) -> None:
        self.ends: list[Moment] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        _wait(pl_module.device)
        self.ends.append((time.perf_counter(), time.process_time()))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def composed(words: list[str], steps: int) -> tuple[DictConfig, object]:
    """The configuration of a run of so many steps, and its data."""
    alone = ["trainer.val_check_interval=0", f"callbacks.checkpoint_every={10 * steps}"]
    config, _ = compose([*words, f"trainer.max_steps={steps}", *alone])
    data = instantiate(config.data, _convert_="all")
    config.data.vocab_size = data.vocab_size
    if config.threads:
        torch.set_num_threads(config.threads)
    return config, data


def ours(config: DictConfig, data: object) -> list[Moment]:
    """Ends of the steps of a run as train.py would make it."""
    method, stopwatch = instantiate(config.model, _convert_="all"), Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = build.trainer(config, method, Path(folder), "benchmark", 1)
        trainer.callbacks.append(stopwatch)
        trainer.fit(method, datamodule=data)
    return stopwatch.ends


def bare(config: DictConfig, data: object) -> list[Moment]:
    """Ends of the steps of a plain loop."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")
    network = instantiate(config.model.network, _convert_="all")().to(device)
    run = torch.compile(network) if config.model.compile else network
    matrices, vectors = ([p for p in network.parameters() if (p.ndim >= 2) is big] for big in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        **{key: config.optimizer[key] for key in ("lr", "eps", "weight_decay")},
        betas=tuple(config.optimizer.betas),
    )
    schedule = instantiate(config.scheduler)
    tokens = data.parts["train"].read(0, len(data.parts["train"]))
    drawn, ends, steps = np.random.default_rng(0), [], config.trainer.max_steps
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * schedule(step, steps)
        begins = drawn.integers(len(tokens) - data.context, size=data.batch_size)
        rows = np.stack([tokens[begin : begin + data.context + 1] for begin in begins]).astype(np.int64)
        ids = torch.from_numpy(rows).to(device, non_blocking=True)
        with mixed:
            loss = run(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
        _wait(device)
        ends.append((time.perf_counter(), time.process_time()))
    return ends


def rates(ends: list[Moment], tokens: int, warm: int) -> list[float]:
    """Tokens per second of the wall's clock and of the processor's, after the first `warm` steps."""
    return [tokens * (len(ends) - 1 - warm) / (last - first) for first, last in zip(ends[warm], ends[-1])]


def main() -> None:
    """Interleave both, print tokens per second and the ratio with its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", nargs="*", default=["model=gpt2", "data=text"], help="as for train.py")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--warm", type=int, default=20, help="steps that are not counted")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    quiet()
    config, data = composed(given.words, given.steps)
    found: dict[str, list[list[float]]] = {"bare loop": [], "ours": []}
    for _ in range(given.repeats):
        for label, loop in (("bare loop", bare), ("ours", ours)):
            found[label].append(rates(loop(config, data), data.tokens_per_step, given.warm))
    print(f"{' '.join(given.words)}: {data.tokens_per_step:,} tokens a step, steps {given.warm} to {given.steps}")
    for clock, name in enumerate(("of the wall's clock", "of the processor's time")):
        bared, own = ([both[clock] for both in found[label]] for label in ("bare loop", "ours"))
        print(f"tokens per second {name}; median [least, most] of {given.repeats}")
        for label, values in (("  bare loop", bared), ("  ours", own)):
            print(f"{label:<18} {statistics.median(values):>10,.0f} [{min(values):,.0f}, {max(values):,.0f}]")
        ratios = [a / b for a, b in zip(own, bared)]
        print(f"  ours / bare loop {statistics.median(ratios):>10.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")


if __name__ == "__main__":
    main()
