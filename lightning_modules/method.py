"""Method: the one base class of everything that trains here."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Method(L.LightningModule):
    """A research method: networks, the loss they are trained with, and how its success is measured.

    A subclass names the batch it eats (`batch_type`) and its `headline` metric with the direction that is better;
    checkpoints, early stopping and sweeps follow it. `optimizer` and `scheduler` are the partials of the
    configuration: `optimizer(parameter_groups)` and `scheduler(step, total) -> factor`.
    """

    batch_type: ClassVar[type]
    headline: ClassVar[tuple[str, str]] = ("val/loss", "min")
    # the test metrics of the final table, by the beginning of their names, and how they are written there
    columns: ClassVar[dict[str, Callable[[float], str]]] = {"": "{:.4g}".format}
    caption: ClassVar[str] = "held-out data"
    leaves: ClassVar[str] = ""  # a sentence of the run's card about what it leaves beside numbers and figures
    packs: ClassVar[bool] = False  # whether it heeds `positions`, so that rows may hold several sequences

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer], scheduler: Callable[..., float]) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.schedule = scheduler
        self.standin = False  # whether the data is generated in the place of the real one
        self._clock: tuple[float, int] | None = None
        self._step_sum: Tensor | None = None

    # What a subclass may say about itself

    def networks(self) -> dict[str, nn.Module]:
        """The parts that are trained, by the name under which their gradient norm is clipped and logged."""
        return {"model": self}

    def network_options(self, name: str) -> dict[str, Any]:
        """Options of a network's parameter groups: `lr`, or `delay` (steps before its schedule starts)."""
        return {}

    def shard_units(self) -> list[nn.Module]:
        """The modules that FSDP2 shards, inner ones first; each must be entered through its `forward`."""
        return []

    def figures(self) -> dict[str, Figure]:
        """Figures of the state after validation or test, by file name."""
        return {}

    def export(self, folder: Path) -> None:
        """Write the result in the field's own format; called on every process, process 0 writes."""

    def count(self, batch: Any) -> int:
        """Units of work in a micro-batch, for the throughput log; the first tensor's rows unless overridden."""
        return len(next(value for value in batch.values() if isinstance(value, Tensor)))

    # Names of metrics: results on a stand-in carry the word wherever they appear

    def metric(self, name: str) -> str:
        """The name under which a metric is logged: `val/greedy`, or `val-standin/greedy` on generated data."""
        stage, _, rest = name.partition("/")
        return f"{stage}-standin/{rest}" if self.standin else name

    def log_step(self, loss: Tensor, **values: Tensor) -> None:
        """Log scalars of an optimizer step under `train/`, as means over its micro-batches and over the processes.

        To be called once for every micro-batch.
        """
        values = {"loss": loss, **values}
        scalars = torch.stack([value.detach().float() for value in values.values()])
        self._step_sum = scalars if self._step_sum is None else self._step_sum + scalars
        if self.trainer.fit_loop._should_accumulate():
            return
        means = self.trainer.strategy.reduce(self._step_sum, reduce_op="mean") / self.trainer.accumulate_grad_batches
        self._step_sum = None
        for name, mean in zip(values, means):
            self.log(f"train/{name}", mean, prog_bar=name == "loss")

    # Optimisation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For every network one group of matrices, with weight decay, and one of vectors and scalars, without."""
        groups = []
        for name, network in self.networks().items():
            trained = [p for p in network.parameters() if p.requires_grad]
            options = {"network": name, **self.network_options(name)}
            groups.append({"params": [p for p in trained if p.ndim >= 2], **options})
            groups.append({"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, **options})
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError(
                f"{type(self).__name__} has nothing to train: every parameter is frozen, so give the optimizer "
                "something by unfreezing a part or adding an adapter (policy.lora)"
            )
        return groups

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(self.parameter_groups())
        total = int(self.trainer.estimated_stepping_batches)

        def factor(delay: int) -> Callable[[int], float]:
            return lambda step: 0.0 if step < delay else self.schedule(step - delay, total - delay)

        factors = [factor(group.get("delay", 0)) for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip each network's gradient norm by itself, log it, and stop where it is not finite.

        A value network and a policy share a step but not a scale: one norm over both would let either drown the other.
        """
        for name in dict.fromkeys(group["network"] for group in optimizer.param_groups):
            parameters = [p for g in optimizer.param_groups if g["network"] == name for p in g["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            # a gradient scaler expects overflows and skips them by itself
            if not torch.isfinite(norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
                raise FloatingPointError(
                    f"the gradient of {name} is {norm.item()} at step {self.global_step}: lower optimizer.lr or raise "
                    "the precision; the last checkpoint is intact"
                )
            self.log(f"grad_norm/{name}", norm)

    # Sharding

    def configure_model(self) -> None:
        """Shard with FSDP2 where the trainer made a device mesh; the networks do not know."""
        mesh = self.device_mesh
        if mesh is None or any(isinstance(p, DTensor) for p in self.parameters()):
            return
        units = self.shard_units()
        if not units:
            raise ValueError(f"{type(self).__name__} names no shard_units: run it with trainer=ddp")
        for unit in units:
            fully_shard(unit, mesh=mesh)

    # Throughput

    def rates(self, units_per_s: float) -> dict[str, float]:
        """What is logged of the speed of training, by name."""
        return {"units_per_s": units_per_s}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._clock is None:
            self._clock = (time.perf_counter(), 0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        began, units = self._clock
        self._clock = (began, units + self.count(batch))
        completes_step = not self.trainer.fit_loop._should_accumulate()
        if completes_step and self.global_step % self.trainer.log_every_n_steps == 0:
            seconds = time.perf_counter() - began
            for name, value in self.rates(self._clock[1] * self.trainer.world_size / seconds).items():
                self.log(f"throughput/{name}", value)
            self._clock = None

    def on_validation_start(self) -> None:
        self._clock = None
