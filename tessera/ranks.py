"""Several processes as one run: starting them, and agreeing between them."""

import os
import subprocess
import sys
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """Processes of this run; 1 outside of torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", 0))


def launch(words: list[str], devices: int) -> int:
    """Start `train.py` with the same words once per device under torchrun, and return its exit status.

    Every rank gets the words of this one job, so that a sweep over many jobs cannot give ranks different values.
    """
    train = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", train]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen([*command, *words], env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return 130


def join(minutes: float = 30) -> None:
    """Enter the process group before anything is read or written, so that ranks can agree from the start."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=timedelta(minutes=minutes))


def agree(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait() -> None:
    """Go on when every rank is here."""
    if dist.is_initialized():
        dist.barrier()
