"""Whether model, data and machine fit together: asked once their code is imported, before anything is loaded."""

import os
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from tessera import ranks
from tessera.words import Refusal

SHARDED = ("fsdp", "ddp_fsdp")
STRATEGIES = ("auto", "ddp", *SHARDED)
ON_NONFINITE = ("stop", "skip")
STAGES = ("fit", "validate", "test", "predict")
POSITIVE = (
    *("data.batch_size", "data.pad_to_multiple", "data.limit", "data.max_prompt", "data.max_response"),
    *("trainer.num_nodes", "trainer.accumulate_grad_batches", "trainer.log_every_n_steps"),
    *("callbacks.checkpoint_every", "callbacks.keep"),
)


def available(accelerator: str) -> int:
    """Devices of an accelerator; a CPU takes as many processes as one likes."""
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        return torch.cuda.device_count()
    return 1024


def devices(settings: DictConfig) -> int:
    """Processes on this node that `trainer.devices` asks for; `auto` is all GPUs, or one process on a CPU."""
    asked = settings.devices
    if asked in ("auto", -1, "-1"):
        count = available(settings.accelerator)
        return 1 if count >= 1024 else count
    return int(asked)


def replicas(settings: DictConfig) -> int:
    """Groups of processes that each hold all of a sharded model: 1 unless hybrid sharding asks for more."""
    nodes = max(settings.num_nodes, ranks.world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size())))
    return (settings.get("replicas") or max(nodes, 2)) if settings.strategy == "ddp_fsdp" else 1


def devices_to_start(config: DictConfig) -> int:
    """Processes that this one has to start: 1 when torchrun started it, or when one is all that is asked for."""
    started = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return 1 if started else devices(config.trainer)


def batch_types(data: DictConfig) -> dict[str, Any]:
    """The kinds of batch that a datamodule serves, by name."""
    return {kind.__name__: kind for kind in get_class(data._target_).serves}


def unserved(config: DictConfig) -> str | None:
    """The batch that the model eats, where the data does not serve it."""
    wanted = get_class(config.model._target_).batch_type.__name__
    return None if wanted in batch_types(config.data) else wanted


def problems(config: DictConfig, choices: dict[str, str]) -> list[str]:
    """One sentence for everything that does not fit, with the word to change."""
    checks = (
        *_batches(config, choices),
        *_way(config),
        *_machine(config.trainer),
        *_sharding(config),
        *_optimizer(config),
        *_sizes(config),
    )
    return [reason for reason in checks if reason]


def refuse(config: DictConfig, choices: dict[str, str]) -> None:
    """Raise Refusal with all problems, if there are any."""
    found = problems(config, choices)
    if found:
        raise Refusal(found)


def _batches(config: DictConfig, choices: dict[str, str]) -> list[str | None]:
    method, served, model = get_class(config.model._target_), batch_types(config.data), choices["model"]
    wanted = method.batch_type.__name__
    own = choices.get("policy", "none") != "none" and "policy" not in config.model
    exact, settings = "optimizer" not in config.model, config.trainer
    shares = max(devices(settings), ranks.world_size()) * settings.accumulate_grad_batches
    return [
        f"model={model} brings its own network, and policy={choices['policy']} would be left over: take policy=none"
        if own else None,
        f"model={model} makes its updates itself, and optimizer={choices['optimizer']} would be left over: take "
        "optimizer=none"
        if exact and choices["optimizer"] != "none" else None,
        f"model={model} trains with an optimizer: take another one than optimizer=none"
        if not exact and choices["optimizer"] == "none" else None,
        f"model={model} makes its updates itself, one after another: take trainer.devices=1 and "
        "trainer.accumulate_grad_batches=1"
        if exact and shares > 1 else None,
        f"model={model} eats {wanted}, and data={choices['data']} serves {', '.join(served)}: change one"
        if wanted not in served else None,
        f"data.packed=true: model={model} needs a row for every sequence; take data.packed=false"
        if config.data.get("packed") and not method.packs else None,
    ]  # fmt: skip


def _way(config: DictConfig) -> list[str | None]:
    unknown = [stage for stage in config.stages if stage not in STAGES]
    known = config.resume in ("auto", "never") or Path(config.resume, "run.json").exists()
    steps, iterations = config.trainer.max_steps, config.model.get("iterations", 1)
    return [
        f"stages={unknown[0]}: there are {', '.join(STAGES)}" if unknown else None,
        f"resume={config.resume} is no run folder (it has no run.json): use auto, never or such a folder"
        if not known else None,
        f"trainer.max_steps={steps} is no multiple of model.iterations={iterations}: every iteration has as many "
        f"steps, so take {iterations * max(1, round(steps / iterations))}"
        if iterations > 0 and steps % iterations else None,
    ]  # fmt: skip


def _machine(settings: DictConfig) -> list[str | None]:
    asked, there = devices(settings), available(settings.accelerator)
    on_cpu = settings.accelerator == "cpu" or there >= 1024
    world = ranks.world_size()
    return [
        f"trainer.accelerator={settings.accelerator}: there is no GPU here; trainer=cpu runs without" if not there else
        f"trainer.devices={asked}: there are {there} devices here" if asked > there else None,
        f"trainer.precision={settings.precision}: float16 needs a GPU; bf16-mixed or 32-true run on a CPU"
        if on_cpu and str(settings.precision).startswith("16") else None,
        f"trainer.strategy={settings.strategy}: there are {', '.join(STRATEGIES)}"
        if settings.strategy not in STRATEGIES else None,
        f"trainer.strategy=fsdp shards over several processes, and trainer.devices={asked}: take trainer=cpu or more"
        if settings.strategy == "fsdp" and max(asked, world) < 2 else None,
        f"trainer.strategy=auto with {max(asked, world)} processes: take trainer=ddp or trainer=fsdp"
        if settings.strategy == "auto" and max(asked, world) > 1 else None,
        "trainer.max_steps and trainer.max_epochs are both unlimited: give one of them"
        if settings.max_steps < 0 and settings.max_epochs < 0 else None,
    ]  # fmt: skip


def _sharding(config: DictConfig) -> list[str | None]:
    settings = config.trainer
    processes, groups = max(devices(settings), ranks.world_size()), replicas(settings)
    return [
        f"trainer.replicas={groups} does not divide the {processes} processes into groups of equal size: take a "
        "divisor, or other trainer.devices"
        if groups < 1 or processes % groups else None,
        f"trainer.sharded_checkpoints=true with trainer.strategy={settings.strategy}: there is nothing sharded to "
        "write, take trainer=fsdp or trainer=ddp_fsdp"
        if settings.sharded_checkpoints and settings.strategy not in SHARDED else None,
        "callbacks.save_async=true with trainer.sharded_checkpoints=true: all processes write a folder together; "
        "leave one of the two out"
        if settings.sharded_checkpoints and config.callbacks.save_async else None,
    ]  # fmt: skip


def _optimizer(config: DictConfig) -> list[str | None]:
    settings, exact = config.trainer, config.optimizer.get("exact", False)
    return [
        f"optimizer.exact=true with trainer.accumulate_grad_batches={settings.accumulate_grad_batches}: a step looks "
        "back at its last micro-batch only; take trainer.accumulate_grad_batches=1, or optimizer=mars"
        if exact and settings.accumulate_grad_batches > 1 else None,
        f"optimizer.exact=true with trainer.precision={settings.precision}: its gradient scaler evaluates a batch "
        "once; take bf16-mixed or 32-true, or optimizer=mars"
        if exact and str(settings.precision).startswith("16") else None,
        f"optimizer=prodigy with trainer.strategy={settings.strategy}: it would measure the distance of each process's "
        "shards; take optimizer=adam_pp, or trainer=ddp"
        if config.optimizer._target_.startswith("prodigyopt.") and settings.strategy in SHARDED else None,
        f"trainer.on_nonfinite={settings.on_nonfinite}: there are {', '.join(ON_NONFINITE)}"
        if settings.on_nonfinite not in ON_NONFINITE else None,
    ]  # fmt: skip


def _sizes(config: DictConfig) -> list[str | None]:
    sizes = {key: OmegaConf.select(config, key) for key in POSITIVE}
    small = [f"{key}={size} must be positive" for key, size in sizes.items() if size is not None and size < 1]
    if small:
        return small
    batch = config.data.get("batch_size")
    shares = max(devices(config.trainer), ranks.world_size()) * config.trainer.accumulate_grad_batches
    return [
        f"data.batch_size={batch} cannot be dealt out to {shares} micro-batches (trainer.devices x "
        f"trainer.accumulate_grad_batches): take a multiple of {shares}"
        if batch is not None and batch % shares else None,
    ]  # fmt: skip
