"""The folder of a run: found again by what the run is, held by one process at a time."""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tessera.checkpoints import write_text

# What changes where a run happens or how it is shown, but not what it computes
COSMETIC = (
    *("logger", "output", "data.cache", "resume", "compare", "label", "debug", "traceback", "record"),
    *("callbacks.checkpoint_every", "callbacks.keep", "callbacks.save_async", "trainer.sharded_checkpoints"),
    "trainer.enable_progress_bar",
    *("trainer.timeout_minutes", "trainer.grace_minutes", "trainer.restarts"),
    # a step's rows are dealt out to processes and micro-batches: how many does not change what is computed
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.replicas"),
    "trainer.accumulate_grad_batches",
    *("start", "ckpt_path"),  # their content counts, among the inputs
)
# What follows from the other words: the weights of the run that this one starts from
DERIVED = ("policy_weights", "policy.weights", "model.policy.weights")
PACKAGES = ("lightning_modules", "datamodules", "kernels")


@cache  # what this process imported, also when a file is edited while it runs
def source_digest() -> str:
    """A digest of the methods' and data modules' source: a cached result never outlives the code that made it."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def fingerprint(config: DictConfig, inputs: dict[str, str]) -> str:
    """What identifies a run: its configuration less the cosmetic parts, its inputs' digests and the source."""
    text = json.dumps({"config": _essential(config), "inputs": inputs, "source": source_digest()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _essential(config: DictConfig) -> dict[str, Any]:
    """A resolved configuration less the cosmetic parts."""
    plain = OmegaConf.to_container(config, resolve=True)
    for place, _, key in (name.rpartition(".") for name in COSMETIC):
        (plain.get(place, {}) if place else plain).pop(key, None)
    return plain


class RunFolder:
    """`<output>/<model>/<data>/<time>-<id>/`, and the little that says what happened in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def results(self) -> dict[str, Any] | None:
        """results.json, once the run has ended."""
        path = self.path / "results.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def record(self) -> dict[str, Any]:
        """run.json: fingerprint, words and start of the run."""
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @classmethod
    def create(cls, parent: Path, record: dict[str, Any], config: DictConfig) -> "RunFolder":
        """A new folder; two runs of the same second get two folders."""
        path = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        path.mkdir(parents=True, exist_ok=False)
        write_text(path / "config.yaml", OmegaConf.to_yaml(config))
        write_text(path / "run.json", json.dumps(record, indent=1))
        return cls(path)

    def give_up(self, error: Exception) -> None:
        """Leave the traceback beside what was trained; where nothing was, leave nothing."""
        if (self.path / "metrics.csv").exists() or (self.path / "checkpoints").exists():
            write_text(self.path / "error.log", "".join(traceback.format_exception(error)))
        else:
            shutil.rmtree(self.path)

    @classmethod
    def latest(cls, parent: Path, identity: str) -> "RunFolder | None":
        """The newest run under `parent` with that fingerprint."""
        folders = [cls(path.parent) for path in sorted(parent.glob("*/run.json"), reverse=True)]
        return next((folder for folder in folders if folder.record.get("fingerprint") == identity), None)

    @classmethod
    def has_ended(cls, parent: Path, identity: str) -> bool:
        """Whether the newest run with that fingerprint has its results."""
        newest = cls.latest(parent, identity)
        return newest is not None and newest.results is not None


def refuse_another(folder: RunFolder, identity: str, config: DictConfig) -> None:
    """Raise ValueError, naming a key that differs, where a run folder belongs to other words than `config`."""
    if folder.record.get("fingerprint") == identity:
        return
    ours, theirs = (_leaves(_essential(c)) for c in (config, OmegaConf.load(folder.path / "config.yaml")))
    changed = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    different = sorted(key for key in changed if key not in DERIVED)
    reason = "its data, its start or the code of the methods has changed since"
    if different:
        key = different[0]
        reason = f"{key} is {theirs.get(key, 'absent')} there and {ours.get(key, 'absent')} here"
    raise ValueError(
        f"resume={folder.path} is another run ({reason}): give its words again, or ckpt_path=<one of its checkpoints> "
        "to go on from its weights with changed words"
    )


def _leaves(node: Any, name: str = "") -> dict[str, Any]:
    """What stands in nested dictionaries, by dotted names."""
    if not isinstance(node, dict) or not node:
        return {name: node}
    return {k: v for part in node for k, v in _leaves(node[part], f"{name}.{part}".lstrip(".")).items()}


@contextmanager
def held(parent: Path, identity: str) -> Iterator[None]:
    """Hold a run's identity under `parent`; wait, and say for whom, while another process is at work on the same run.

    The lock is the operating system's: it ends with its process, however that ends.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / f".{identity[:16]}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"waiting for {file.read().strip()}, at work on the same run", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield
