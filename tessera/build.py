"""From a configuration to Lightning's objects."""

import importlib.util
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig, OmegaConf

from lightning_modules.method import Method
from tessera.check import SHARDED, replicas
from tessera.checkpoints import VerifiedCheckpointIO
from tessera.fsdp import Sharding
from tessera.metrics_csv import MetricsCSV
from tessera.progress import progress_bar
from tessera.report import Figures
from tessera.saving import Newest
from tessera.stopping import STOP


def strategy(settings: DictConfig) -> Strategy | str:
    """Lightning's strategy for `trainer.strategy`."""
    timeout = timedelta(minutes=settings.timeout_minutes)
    if settings.strategy == "ddp":
        return DDPStrategy(timeout=timeout)
    if settings.strategy in SHARDED:
        return Sharding(replicas(settings), settings.sharded_checkpoints, timeout)
    return settings.strategy


def callbacks(settings: DictConfig, validated: int, monitor: str, mode: str, folder: Path) -> list[Callback]:
    """Early stopping where asked for, the best checkpoint by the headline metric, the newest ones.

    In this order: a checkpoint contains what the callbacks before it know.
    """
    checkpoints = folder / "checkpoints"
    stop = [EarlyStopping(monitor, mode=mode, patience=settings.patience)] if settings.patience else []
    best = ModelCheckpoint(
        dirpath=checkpoints,
        filename="best",
        monitor=monitor,
        mode=mode,
        enable_version_counter=False,
    )
    newest = Newest(checkpoints, settings.checkpoint_every, validated, STOP)
    return [*stop, *([best] if validated else []), newest]


def wandb_mode() -> str:
    """online when there is a key and the service answers within two seconds, else offline."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _netrc()
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not has_key:
        return "offline"
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=2).close()
        return "online"
    except OSError as error:
        print(f"warning: W&B at {address.netloc} does not answer ({error}); logging offline", file=sys.stderr)
        return "offline"


def end_wandb() -> None:
    """Close W&B's run, if there is one: a process has one at a time, and the next phase logs into its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def _netrc() -> str:
    path = Path.home() / ".netrc"
    return path.read_text(errors="replace") if path.exists() else ""


def loggers(settings: DictConfig, folder: Path, name: str, config: DictConfig) -> list[Logger]:
    """metrics.csv always; W&B and TensorBoard where the configuration names them."""
    made: list[Logger] = [MetricsCSV(folder)]
    if "wandb" in settings:
        from lightning.pytorch.loggers import WandbLogger

        offline = wandb_mode() != "online"
        made.append(WandbLogger(name=name, save_dir=folder, offline=offline, id=folder.name, **settings.wandb))
        made[-1].log_hyperparams(OmegaConf.to_container(config, resolve=True))
    if "tensorboard" in settings:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("logger=tensorboard needs TensorBoard: pip install 'tessera[tensorboard]', or logger=csv")
        from lightning.pytorch.loggers import TensorBoardLogger

        made.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    return made


def trainer(config: DictConfig, method: Method, folder: Path, name: str, world: int) -> L.Trainer:
    """Lightning's Trainer with our strategy, checkpoint I/O, loggers and callbacks."""
    settings: dict[str, Any] = dict(config.trainer)
    method.on_nonfinite = settings.pop("on_nonfinite")
    validated = settings.pop("val_check_interval")
    every = validated * settings["accumulate_grad_batches"]
    settings["strategy"] = strategy(config.trainer)
    # the launcher's, and the strategy's
    for key in ("grace_minutes", "restarts", "timeout_minutes", "sharded_checkpoints", "replicas"):
        settings.pop(key, None)
    if world > 1:  # started by torchrun, or as by torchrun: what it started is what there is
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        settings |= {"devices": local, "num_nodes": world // local}
    monitor, mode = method.headline
    written = VerifiedCheckpointIO(config.callbacks.keep)
    made: L.Trainer = instantiate(
        {"_target_": settings.pop("_target_")},
        **settings,
        # counted in optimizer steps here and in micro-batches by Lightning
        val_check_interval=every or None,
        limit_val_batches=None if every else 0,
        check_val_every_n_epoch=None if every else 1,
        default_root_dir=folder,
        logger=loggers(config.logger, folder, name, config),
        callbacks=[
            *callbacks(config.callbacks, validated, method.metric(monitor), mode, folder),
            Figures(folder),
            *([progress_bar(name)] if config.trainer.enable_progress_bar else []),
        ],
        plugins=[
            AsyncCheckpointIO(written) if config.callbacks.save_async else written,
            # also inside of a SLURM job, whose variables Lightning would otherwise take for its own launch
            TorchElasticEnvironment() if world > 1 else LightningEnvironment(),
        ],
        use_distributed_sampler=False,
        inference_mode=config.trainer.strategy not in SHARDED,  # sharded parameters cannot be inference tensors
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    # the signals are ours: Lightning's handlers call a collective where they interrupt, and save nothing
    made._signal_connector.register_signal_handlers = lambda: None
    return made
