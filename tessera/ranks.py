"""Several processes as one run: starting them, and agreeing between them."""

import logging
import os
import secrets
import sys
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

T = TypeVar("T")
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def world_size() -> int:
    """Processes of this run; 1 outside of torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", 0))


def launch(words: list[str], devices: int) -> int:
    """Start `train.py` with the same words once per device, as torchrun does, and return its exit status.

    Every rank gets the words of this one job, so that a sweep over many jobs cannot give ranks different values.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=secrets.token_hex(8),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(settings, sys.executable)("-u", str(TRAIN), *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (1, 130):  # the rank has said why
            return failure.exitcode
        print(f"error: process {rank} ended with status {failure.exitcode}", file=sys.stderr)
        return 1
    except SignalException as signal:
        return 128 + signal.sigval
    return 0


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
