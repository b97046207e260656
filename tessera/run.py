"""The way of one run: compose, check, find its folder, build, run the stages, say what came out."""

import logging
import re
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_modules.method import Method
from tessera import build, ranks, report
from tessera.check import refuse, unserved
from tessera.checkpoints import newest_valid, outline, sha256, sweep_up, write_text
from tessera.comparison import beside
from tessera.compose import compose
from tessera.folder import RunFolder, fingerprint, held, refuse_another
from tessera.sharded import set_aside
from tessera.stopping import STOP
from tessera.words import Refusal, about, phase


@dataclass
class Plan:
    """One run, composed and checked, its data found."""

    name: str
    words: list[str]
    config: DictConfig
    data: L.LightningDataModule
    start: RunFolder | None
    identity: str

    @property
    def parent(self) -> Path:
        """Where runs of this model on this data are."""
        return Path(self.config.output, self.name, self.data.name)


class Once(logging.Filter):
    """Several runs in one process say the same thing once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self.said
        self.said.add(text)
        return new


def quiet() -> None:
    """Leave the screen to what the run says."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logging.addLevelName(logging.WARNING, "warning")
    logging.root.handlers[0].addFilter(Once())
    if ranks.rank() > 0:
        logging.root.setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for message in (
        ".*treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*number of training batches.*",
        ".*The dirpath has changed.*",  # a checkpoint of another run is tested
        ".*Checkpoint directory .* exists and is not empty.*",  # as it does when a run goes on
        ".*your dataloader is not resumable.*",  # it is: its sampler begins at the step
        ".*on epoch level in distributed setting.*",  # what is logged there is already the same on all
    ):
        warnings.filterwarnings("ignore", message)
    warnings.showwarning = lambda message, *_: logging.root.warning(message)


def main(words: list[str]) -> int:
    """Run what the words ask for, then the runs it is compared with, and print the table."""
    quiet()
    with STOP.listening():
        return _all(words)


def _all(words: list[str]) -> int:
    config, choices = compose(words)
    ranks.join(config.trainer.timeout_minutes)
    if ranks.rank() == 0 and (recipe := choices.get("recipe/real")):
        print(f"real rows: {about(f'recipe/real/{recipe}')} (conf/recipe/real/{recipe}.yaml)")
    compared = config.compare or {}
    others = {label: phase(list(other), words) for label, other in compared.items()}
    for label, other in list(others.items()):
        if missing := unserved(compose(other)[0]):
            del others[label]
            if ranks.rank() == 0:
                print(f"{label} is left out of the comparison: it eats {missing}, which this data does not serve")
        else:
            refuse(*compose(other))
    plan = prepare(words)
    before = time.time()
    folder = carry_out(plan, plan.config.record)
    if ranks.rank() == 0 and (folder.path / "results.json").stat().st_mtime < before:
        print(f"{plan.name} on {plan.data.name} was done before, in {folder.path}; resume=never trains anew")
    rows = {f"{_label(plan.start)} (start)": plan.start} if plan.start else {}
    for label, other in others.items():
        rows[label] = carry_out(prepare(other))
    if ranks.rank() == 0 and folder.results:
        rows[config.label or plan.name.upper()] = folder
        beside(rows, folder.path / "figures" / "compared.png")
        report.finish(folder, rows)
    return 0


def _label(folder: RunFolder) -> str:
    return folder.results["model"].upper()


def prepare(words: list[str]) -> Plan:
    """Compose and check; carry out the run whose weights this one starts from; find the data."""
    config, choices = compose(words)
    refuse(config, choices)
    inputs, start = {}, None
    if config.ckpt_path:
        outline(Path(config.ckpt_path))  # refused, if so, before another run is carried out for this one
        inputs["checkpoint"] = sha256(Path(config.ckpt_path))
    if config.threads:
        torch.set_num_threads(config.threads)
    data = instantiate(config.data, _convert_="all")
    if "vocab_size" in config.data:
        config.data.vocab_size = data.vocab_size  # which only the tokenizer knows, and the network is built with
    trains = "fit" in config.stages or not config.ckpt_path  # else the checkpoint brings all weights
    if config.start and trains and not config.policy_weights:
        first = prepare(phase(list(config.start), words))
        if not RunFolder.has_ended(first.parent, first.identity):
            # what the method refuses, it refuses before another run; instantiating resolves `policy_weights` for good
            instantiate(compose(words)[0].model, _convert_="all")
        start = carry_out(first)
        inputs["start"] = start.record["fingerprint"]
    elif config.policy_weights:
        inputs["start"] = _digest(Path(config.policy_weights))
    identity = fingerprint(config, {**inputs, "data": data.fingerprint})
    if start:
        config.policy_weights = str(start.path / "export")
    return Plan(choices["model"], words, config, data, start, identity)


def _digest(weights: Path) -> str:
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        raise ValueError(f"policy_weights={weights} holds no *.safetensors: give the export folder of a run")
    return " ".join(sha256(file) for file in files)


def carry_out(plan: Plan, record: str | None = None) -> RunFolder:
    """Run the plan in a folder of its own, or take up where an earlier attempt stopped, or read what it found.

    `record` is a file that receives the folder's path before the run begins.
    """
    first = ranks.rank() == 0
    resume = plan.config.resume
    with held(plan.parent, plan.identity) if first else nullcontext():
        folder = RunFolder(Path(ranks.agree(str(_folder(plan, resume)) if first else "")))
        ranks.wait()
        if first and record:
            write_text(Path(record), str(folder.path.resolve()))
        if folder.results:
            return folder
        try:
            _execute(plan, folder)
        except Exception as error:
            if first:
                folder.give_up(error)
            raise
    return folder


def _folder(plan: Plan, resume: str) -> Path:
    if resume not in ("auto", "never"):
        refuse_another(RunFolder(Path(resume)), plan.identity, plan.config)
        return Path(resume)
    before = RunFolder.latest(plan.parent, plan.identity) if resume == "auto" else None
    if before:
        return before.path
    record = {"fingerprint": plan.identity, "words": plan.words, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    return RunFolder.create(plan.parent, record, plan.config).path


def _execute(plan: Plan, folder: RunFolder) -> None:
    began = time.monotonic()
    config, first = plan.config, ranks.rank() == 0
    if first:
        print(f"{plan.name} on {plan.data.name} -> {folder.path}", flush=True)
    L.seed_everything(config.seed, verbose=False)
    method: Method = instantiate(config.model, _convert_="all")
    method.meet(plan.data)
    method.train()  # transformers loads in eval mode
    world = ranks.world_size()
    trainer = build.trainer(config, method, folder.path, plan.name, world)
    checkpoint = _checkpoint(config, folder, method)
    metrics: dict[str, float] = {}
    try:
        for stage in config.stages:
            metrics |= _stage(stage, trainer, method, plan.data, checkpoint, folder.path)
    finally:
        build.end_wandb()
    if first:
        report.write_results(folder, plan, method, metrics, time.monotonic() - began)


def _checkpoint(config: DictConfig, folder: RunFolder, method: Method) -> Path | None:
    path = ranks.agree(_newest(folder.path / "checkpoints") if ranks.rank() == 0 else None)
    path = path or (config.ckpt_path and Path(config.ckpt_path))
    if path:
        _fits(path, method)
    return path


def _newest(checkpoints: Path) -> Path | None:
    for folder in (checkpoints, checkpoints.parent):
        sweep_up(folder)
    path, broken = newest_valid(checkpoints)
    for other, reason in broken.items():
        print(f"warning: passed over: {reason}", file=sys.stderr)
        if other.exists():
            set_aside(other)
    if path:
        print(f"continuing from {path}", flush=True)
    return path


def _fits(path: Path, method: Method) -> None:
    """Refuse a checkpoint of another model before anything is loaded from it."""
    saved = outline(path).get("state_dict")
    if saved is None:
        raise ValueError(f"{path} holds no state_dict: it is not a checkpoint of a run")
    ours = {name: tuple(value.shape) for name, value in method.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in saved.items()}
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{path} is a checkpoint of another model: {name} is {theirs.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} here ({len(different)} differences)"
        )


def _stage(
    stage: str, trainer: L.Trainer, method: Method, data: Any, checkpoint: Path | None, folder: Path
) -> dict[str, float]:
    if stage == "fit":
        _fit(trainer, method, data, checkpoint, folder)
        return {}
    fitted = trainer.state.fn == "fit"
    path = None if fitted or checkpoint is None else str(checkpoint)
    getattr(trainer, stage)(method, datamodule=data, ckpt_path=path, weights_only=True, **_quiet(stage))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _quiet(stage: str) -> dict[str, Any]:
    return {} if stage == "predict" else {"verbose": False}


def _fit(trainer: L.Trainer, method: Method, data: Any, checkpoint: Path | None, folder: Path) -> None:
    step = outline(checkpoint)["global_step"] if checkpoint else 0
    trainer.logger.rewind(step)
    trainer.fit(method, datamodule=data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    # where an earlier attempt ended here, Lightning has restored one step less for its loggers
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
    final = folder / "checkpoints" / f"step-{trainer.global_step:06d}.ckpt"
    if ranks.agree(not final.exists()):
        trainer.save_checkpoint(final)
        trainer.strategy.checkpoint_io.teardown()  # where it is written in another thread, wait for that
    method.export(folder / "export")


def sentences(error: Exception) -> list[str]:
    """What went wrong, for a person: the innermost cause, and for errors that are not ours where it happened."""
    if isinstance(error, Refusal):
        return error.reasons
    if lost := ranks.lost(error):
        return [lost]
    key = None
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        found = re.search(r"full_key: (\S+)", str(error))
        key, error = (found.group(1) if found else key), error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    ours = isinstance(error, (ValueError, OSError, FloatingPointError, ImportError))
    if not ours or key:
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        place = f" [{Path(frame[0].filename).name}:{frame[0].lineno}]" if frame and not ours else ""
        text = (
            f"{type(error).__name__ + ': ' if not ours else ''}{text}{f' (while building {key})' if key else ''}{place}"
        )
    return [text if ours else f"{text}; debug=full shows the traceback"]
