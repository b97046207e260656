"""Several processes as one run: starting them, agreeing between them, and saying which one failed first."""

import json
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tessera.heartbeat import Heartbeat

T = TypeVar("T")
TRAIN = Path(__file__).resolve().parent.parent / "train.py"
COMMUNICATION = "gloo|nccl|pair closure|closed by peer|reset by peer"  # what errors between processes speak of
SPOKEN = (1, 130, 143)  # exit statuses of a process that has said why it ends
# torch elastic would keep one store over restarts, in which processes find the addresses of those before them
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
OURS = "TESSERA_LAUNCHED"  # set for processes that `launch` started: it speaks for them
_heartbeat: Heartbeat | None = None


def world_size() -> int:
    """Processes of this run; 1 outside of torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", 0))


# Starting


def launch(words: list[str], devices: int, settings: DictConfig) -> int:
    """Start `train.py` with the same words once per device, as torchrun does, and return its exit status.

    Every rank gets the words of this one job, so that a sweep over many jobs cannot give ranks different values. When
    one of them fails, all are started again up to `settings.restarts` times, and continue from the newest checkpoint.
    Processes that are asked to stop have `settings.grace_minutes` to save.
    """
    logging.disable(logging.CRITICAL)  # the ranks speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[OURS] = "1"
    os.environ[FRESH_STORE] = "1"
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=secrets.token_hex(8),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=settings.restarts,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        **_patience(settings.grace_minutes),
    )
    with tempfile.TemporaryDirectory() as folder:
        launch.logs_specs = DefaultLogsSpecs(log_dir=folder)
        try:
            elastic_launch(launch, sys.executable)("-u", str(TRAIN), *words)
        except ChildFailedError as error:
            return _tell(root_cause(list(error.failures.items())))
        except SignalException as stopped:
            attempts = sorted(Path(folder).rglob("attempt_*"), key=lambda path: int(path.name.partition("_")[2]))
            failed = sorted(attempts[-1].rglob("error.json")) if attempts else []
            if failed:  # what went wrong while they were stopping
                return _say(json.loads(failed[0].read_text())["sentences"])
            return 143 if stopped.sigval == signal.SIGUSR1 else 128 + stopped.sigval
    return 0


def _patience(minutes: float) -> dict[str, int]:
    """How long the launcher waits for processes that are saving; 30 s before torch 2.13."""
    known = "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    return {"shutdown_timeout": round(60 * minutes)} if known else {}


def root_cause(failures: list[tuple[int, ProcessFailure]]) -> tuple[int, ProcessFailure]:
    """The rank and failure that the others follow from.

    First a process that says what went wrong (the launcher then kills those that do not leave), then one that was
    killed, then those that merely lost another one or were asked to stop.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, float]:
        failure, data = item[1], item[1].error_file_data
        follows = data.get("follows", failure.exitcode in SPOKEN)
        return 2 if follows else int(failure.exitcode < 0), data.get("at", failure.timestamp)

    return min(failures, key=order)


def _tell(failed: tuple[int, ProcessFailure]) -> int:
    number, failure = failed
    _say(failure.error_file_data.get("sentences", []))
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; out of memory is one reason" if name == "SIGKILL" else ""
        print(f"error: process {number} was killed by {name}{hint}; the others were stopped", file=sys.stderr)
    elif failure.exitcode not in SPOKEN:
        print(f"error: process {number} ended with status {failure.exitcode}", file=sys.stderr)
    return failure.exitcode if failure.exitcode in SPOKEN else 1


def _say(sentences: list[str]) -> int:
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)
    return 1


def report(sentences: list[str], follows: bool) -> None:
    """Leave what went wrong for the launcher, in torch elastic's format; print it unless `launch` will.

    `follows` says that this process only lost another one.
    """
    text = [f"process {rank()}: {sentence}" for sentence in sentences] if rank() else sentences
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = time.time()
        record = {"message": " ".join(text), "timestamp": int(now), "sentences": text, "at": now, "follows": follows}
        Path(path).write_text(json.dumps(record))
    if OURS in os.environ and "LOCAL_RANK" in os.environ:
        return
    if rank():
        time.sleep(1)  # what all processes stumble over, the first one says; then this one is no longer there
    _say(text)


# Agreeing


def join(minutes: float) -> None:
    """Enter the process group before anything is read or written, so that ranks can agree from the start."""
    global _heartbeat
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.environ.get(FRESH_STORE) != "1" and rank() == 0:
        logging.warning("started again by torchrun: export %s=1, or processes may look for old addresses", FRESH_STORE)
    timeout = timedelta(minutes=minutes)
    store, number, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    _heartbeat = Heartbeat(dist.PrefixStore("tessera", store), number, world)
    _heartbeat.start()
    dist.init_process_group(store=store, rank=number, world_size=world, timeout=timeout)


def at(place: str) -> None:
    """Note where this process is, for the others to say when it no longer answers."""
    if _heartbeat:
        _heartbeat.place = place


def lost(error: Exception) -> str | None:
    """A sentence about the process that did not answer, when `error` is of the communication between them."""
    between = isinstance(error, dist.DistError) or re.search(COMMUNICATION, str(error), re.IGNORECASE)
    if not (_heartbeat and between):
        return None
    return _heartbeat.diagnosis("trainer.timeout_minutes is over" if _silent(error) else "the connection broke")


def _silent(error: Exception) -> bool:
    return re.search("timed out|timeout", str(error), re.IGNORECASE) is not None


def follows(error: Exception) -> bool:
    """Whether `error` is only that another process is gone."""
    return lost(error) is not None and not _silent(error)


def agree(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def largest(number: int) -> int:
    """The largest of the ranks' numbers, on every rank."""
    if not dist.is_initialized():
        return number
    box = torch.tensor(number)  # on the CPU: the accelerator's queue need not be waited for
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def wait() -> None:
    """Go on when every rank is here."""
    largest(0)
