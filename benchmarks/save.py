"""How long a save holds up training: a plain write and sync of as many bytes, ours, ours in a thread, Lightning's.

python benchmarks/save.py --megabytes 100 --repeats 15
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

from tessera.checkpoints import VerifiedCheckpointIO


def plain(content: bytes, path: Path) -> None:
    """What any durable save costs."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Interleave the ways, wait for whatever is still being written outside of the clock, print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary folder")
    given = parser.parse_args()
    size = given.megabytes * 10**6 // 4 // 10
    checkpoint = {"global_step": 1, "state_dict": {f"layer{n}": torch.randn(size) for n in range(10)}}
    content = os.urandom(given.megabytes * 10**6)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        theirs = TorchCheckpointIO()
        asynchronous = AsyncCheckpointIO(VerifiedCheckpointIO())
        ways = {
            "plain write + fsync": lambda: plain(content, folder / "plain"),
            "ours": lambda: VerifiedCheckpointIO().save_checkpoint(checkpoint, folder / "ours.ckpt"),
            "ours, save_async": lambda: asynchronous.save_checkpoint(checkpoint, folder / "async.ckpt"),
            "Lightning (no fsync, no digest)": lambda: theirs.save_checkpoint(checkpoint, folder / "theirs.ckpt"),
        }
        for _ in range(given.repeats + 1):
            for label, save in ways.items():
                os.sync()
                began = time.perf_counter()
                save()
                seconds.setdefault(label, []).append(time.perf_counter() - began)
                asynchronous.teardown()
    base = seconds["plain write + fsync"][1:]
    print(f"{given.megabytes} MB, {given.repeats} repeats after one that is not counted; median [10 %, 90 %]")
    for label, values in seconds.items():
        ratios = [value / other for value, other in zip(values[1:], base)]
        print(f"{label:<34} {_spread(values[1:])} s   {_spread(ratios)} x plain")


def _spread(values: list[float]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.3f} [{tenths[0]:.3f}, {tenths[-1]:.3f}]"


if __name__ == "__main__":
    main()
