"""Method: the one base class of everything that trains here."""

import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import rich
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.optimizers.groups import DEFAULT, split, table, without_rules
from lightning_modules.optimizers.groups import options as rule_options


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
        self.make_optimizer, self.group_rules = without_rules(optimizer)
        # Hydra's partials check their target at every call, and a schedule is called in every step
        plain = isinstance(scheduler, functools.partial)
        self.schedule = functools.partial(scheduler.func, **scheduler.keywords) if plain else scheduler
        self.on_nonfinite = "stop"  # or "skip": what a gradient that is not finite does to training
        self.standin = False  # whether the data is generated in the place of the real one
        self._clock: tuple[float, int] | None = None
        self._step_sum: Tensor | None = None
        self._skipped: set[int] = set()

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

    def meet(self, data: L.LightningDataModule) -> None:
        """Look at the data before the trainer is made; what is measured, such as `headline`, may depend on it."""
        self.standin = getattr(data, "standin", False)

    def owes_checkpoint(self, step: int) -> bool:
        """Whether a run that goes on needs the state after this step, whatever `callbacks.checkpoint_every` says."""
        return False

    @property
    def scheduled_steps(self) -> int:
        """Optimizer steps over which a schedule runs."""
        return int(self.trainer.estimated_stepping_batches)

    # Names of metrics: results on a stand-in carry the word wherever they appear

    def metric(self, name: str) -> str:
        """The name under which a metric is logged: `val/greedy`, or `val-standin/greedy` on generated data."""
        stage, _, rest = name.partition("/")
        return f"{stage}-standin/{rest}" if self.standin else name

    def log_step(self, loss: Tensor, **values: Tensor) -> None:
        """Log scalars of an optimizer step under `train/`, as means over its micro-batches and over the processes.

        To be called once for every micro-batch. What an optimizer evaluates a second time is not logged.
        """
        if self.looking_back or not self.logs_now:
            return
        values = {"loss": loss, **values}
        scalars = torch.stack([value.detach().float() for value in values.values()])
        self._step_sum = scalars if self._step_sum is None else self._step_sum + scalars
        if self.trainer.fit_loop._should_accumulate():
            return
        means = self.trainer.strategy.reduce(self._step_sum, reduce_op="mean") / self.trainer.accumulate_grad_batches
        self._step_sum = None
        for name, mean in zip(values, means):
            self.log(f"train/{name}", mean, prog_bar=name == "loss")

    @property
    def logs_now(self) -> bool:
        """Whether what is logged in this step is written: a small network's step is too short to ask a logger."""
        return self.trainer._logger_connector.should_update_logs

    # Optimisation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For every network the groups of `optimizer.groups`.

        Without that, one of matrices, with weight decay, and one of vectors and scalars, without.
        """
        rules, base = self.group_rules or DEFAULT, getattr(self.make_optimizer, "keywords", {}).get("lr")
        groups = []
        for name, network in self.networks().items():
            own = {"network": name, **self.network_options(name)}
            for rule, parameters in split(network, rules).items():
                options = {"group": rule, **own, **rule_options(rules[rule], own.get("lr", base))}
                groups += [{"params": parameters, **options}] if parameters else []
        if not groups:
            raise ValueError(
                f"{type(self).__name__} has nothing to train: every parameter is frozen, so give the optimizer "
                "something by unfreezing a part or adding an adapter (policy.lora)"
            )
        return groups

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(self.parameter_groups())
        total = self.scheduled_steps

        def factor(delay: int) -> Callable[[int], float]:
            return lambda step: 0.0 if step < delay else self.schedule(step - delay, total - delay)

        factors = [factor(group.get("delay", 0)) for group in optimizer.param_groups]
        if self.group_rules and self.trainer.is_global_zero:
            rich.print(table(optimizer.param_groups))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip each network's gradient norm by itself and log it; stop or skip the step where one is not finite.

        A value network and a policy share a step but not a scale: one norm over both would let either drown the other.
        """
        networks: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            networks.setdefault(group["network"], []).extend(group["params"])
        totals = {name: _norm(parameters) for name, parameters in networks.items()}
        norms = {name: _whole(total) for name, total in totals.items()}
        # a gradient scaler expects overflows and skips them by itself
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        broken = None if scaled else next((name for name, norm in norms.items() if not torch.isfinite(norm)), None)
        if broken:
            self._leave_out(broken, norms[broken])
        for name, parameters in networks.items():
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val or math.inf, totals[name])
        if self.logs_now and not self.looking_back:
            self.log_dict({f"grad_norm/{name}": norm for name, norm in norms.items()})
            if self.on_nonfinite == "skip":
                self.log("train/skipped", float(len(self._skipped)))

    def _leave_out(self, network: str, norm: Tensor) -> None:
        """Drop all gradients of the step, or raise FloatingPointError; all processes know the same norm."""
        step = self.global_step
        if self.on_nonfinite == "skip":
            if not self._skipped:
                warnings.warn(
                    f"the gradient of {network} is {norm.item()} at step {step}, which is skipped", stacklevel=2
                )
            self._skipped.add(step)
            for parameter in self.parameters():
                parameter.grad = None
            return
        culprits = (name for name, p in self.named_parameters() if not torch.isfinite(_whole(_norm([p]))))
        parameter = next(culprits, "no single parameter").replace("_orig_mod.", "")
        newest = max(Path(self.trainer.default_root_dir, "checkpoints").glob("step-*.ckpt"), default=None)
        left = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise FloatingPointError(
            f"the gradient of {network} is {norm.item()} at step {step}, first in {parameter}: lower optimizer.lr or "
            f"raise the precision, or leave such steps out with trainer.on_nonfinite=skip; {left}"
        )

    # An optimizer that looks at other points than the last iterate

    @property
    def looking_back(self) -> bool:
        """Whether a batch is evaluated a second time, at the previous parameters (`MARS` with `exact`)."""
        return any(getattr(optimizer, "looking_back", False) for optimizer in self.trainer.optimizers)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        """A step; running statistics, such as BatchNorm's, move in the first evaluation of a batch only."""

        def closure() -> Any:
            if not self.looking_back:
                return optimizer_closure()
            kept = [buffer.clone() for buffer in self.buffers()]
            loss = optimizer_closure()
            for buffer, before in zip(self.buffers(), kept):
                buffer.copy_(before)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _set_mode(self, mode: str) -> None:
        """Let optimizers that evaluate a mean of the iterates put it in place ("eval") or take it back ("train")."""
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    def on_train_start(self) -> None:
        self._set_mode("train")

    def on_validation_start(self) -> None:
        self._clock = None
        self._set_mode("eval")

    def on_validation_end(self) -> None:
        self._set_mode("train")

    def on_train_end(self) -> None:
        self._set_mode("eval")

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
            self._log_scales()

    def _log_scales(self) -> None:
        """What a parameter-free optimizer found in the place of a learning rate."""
        for optimizer in self.trainer.optimizers:
            scales = optimizer.scales() if hasattr(optimizer, "scales") else {}
            self.log_dict({f"optimizer/{name}": value.float() for name, value in scales.items()})


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm over the gradients that there are; a DTensor where they are sharded."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
