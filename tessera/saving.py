"""When a run is saved, so that it can go on exactly where it was: the newest steps, and the one at which it stops.

What a checkpoint holds besides Lightning's part (weights, optimizer, schedule, progress): the random states of every
process, whether the validation of its step is still to come, and in how many micro-batches a step was accumulated, so
that it can go on in another number. Methods do nothing for this. Only whole steps are saved.
"""

import copy
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader

from tessera import ranks
from tessera.stopping import Stop, Stopped

# in Lightning's record of a fit loop: micro-batches of the pass, and of the validation
BATCHES, VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


def random_states() -> dict[str, Any]:
    """The states of every generator that a method may draw from, in types that load with `weights_only=True`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore(states: dict[str, Any]) -> None:
    """Set the generators of this process to what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


class Newest(Checkpoint):
    """A checkpoint `step-<step>.ckpt` at every multiple of `every` optimizer steps, where the method owes one, and one
    when the run is asked to stop, which it then does.

    A step that is validated, every `validated` steps, is saved after its validation: resumed from an earlier state of
    that step, Lightning would leave the validation out. A run that is stopped before or within a validation says so in
    its checkpoint and begins with that validation when it goes on. (Lightning's own ModelCheckpoint saves before the
    validation and, at the last batch of an epoch, waits for a validation that may not come.)
    """

    def __init__(self, folder: Path, every: int, validated: int, stop: Stop) -> None:
        self.folder, self.every, self.validated, self.stop = folder, every, validated, stop
        self._saved = self._seen = 0
        self._validating: dict[str, Any] | None = None  # what was true when the validation under way began
        self._owed = False  # the validation of the restored step
        self._restored: dict[str, Any] | None = None

    # Going on

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._restored = {"step": checkpoint["global_step"], "rng": checkpoint.get("rng")}
        self._owed = checkpoint.get("validation_owed", False)
        before = checkpoint.get("accumulate_grad_batches", trainer.accumulate_grad_batches)
        if before != trainer.accumulate_grad_batches:
            progress = checkpoint["loops"]["fit_loop"][BATCHES]
            for counts in (progress["current"], progress["total"]):
                _recount(counts, before, trainer.accumulate_grad_batches)

    def on_train_start(self, trainer, pl_module) -> None:
        self.stop.defer()
        self._saved = self._seen = trainer.global_step
        _give_generators(trainer)
        if self._restored and self._restored["rng"]:
            self._restore(**self._restored)
        self._restored = None
        if self._owed:
            self._saved, self._owed = -1, False
            _validate(trainer)

    def _restore(self, step: int, rng: list[dict[str, Any]]) -> None:
        if len(rng) == ranks.world_size():
            restore(rng[ranks.rank()])
        else:  # other processes than those that saved: streams of their own, the same ones every time
            L.seed_everything((step * 1_000_003 + ranks.rank()) % 2**32, verbose=False)

    # Saving and stopping

    def on_train_batch_start(self, trainer, pl_module, batch: Any, batch_idx: int) -> None:
        ranks.at(f"at step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer, pl_module, *batch: Any) -> None:
        if trainer.global_step == self._seen:
            return  # under accumulation, a step is seen at several micro-batches
        self._seen = trainer.global_step
        validated = bool(self.validated) and self._seen % self.validated == 0
        if validated and _is_last(trainer):
            return
        asked = self.stop.agreed()
        if asked or (self._due(self._seen, pl_module) and not validated):
            # Lightning logs the step only now, and a kill in between must not lose its row
            trainer._logger_connector.update_train_step_metrics()
            self._validating = self._before(trainer) if validated else None
            self._save(trainer)
        self._leave(asked)

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.state.fn == "fit":
            ranks.at(f"in the validation after step {trainer.global_step}")
            # every process asks the others equally often, also where one has more batches
            together = min(ranks.gather(sum(trainer.num_val_batches)))
            self._validating = {**self._before(trainer), "together": 0 if _is_last(trainer) else together}

    def on_validation_batch_end(self, trainer, pl_module, *batch: Any) -> None:
        if self._validating and self._validating["together"]:
            self._validating["together"] -= 1
            asked = self.stop.agreed()
            if asked:
                self._save(trainer)
            self._leave(asked)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self._validating = None

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.state.fn != "fit":
            return
        asked = self.stop.agreed()
        if asked or self._due(trainer.global_step, pl_module):
            self._save(trainer)
        self._leave(asked)

    def on_train_end(self, trainer, pl_module) -> None:
        self.stop.at_once()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self.stop.at_once()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        begun = self._validating or {"rng": random_states()}
        checkpoint["rng"] = ranks.gather(begun["rng"])
        checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches
        checkpoint["validation_owed"] = self._validating is not None
        if self._validating:
            checkpoint["loops"]["fit_loop"][VALIDATION] = begun["progress"]

    def _before(self, trainer) -> dict[str, Any]:
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
        return {"rng": random_states(), "progress": copy.deepcopy(progress)}

    def _due(self, step: int, module: L.LightningModule) -> bool:
        owes = getattr(module, "owes_checkpoint", None)
        return step % self.every == 0 or (owes is not None and owes(step))

    def _save(self, trainer) -> None:
        if self._saved == trainer.global_step:
            return
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step-{self._saved:06d}.ckpt")

    def _leave(self, asked: int) -> None:
        if asked:
            raise Stopped(asked)


def _recount(counts: dict[str, int], before: int, now: int) -> None:
    """Turn counts of micro-batches into those of the same steps, accumulated in `now` of them instead of `before`."""
    under_way = counts["ready"] - counts["completed"]
    counts |= {name: counts["ready"] // before * now for name in ("ready", "started", "processed")}
    counts["completed"] = counts["ready"] - under_way


def _give_generators(trainer) -> None:
    """Let loaders draw their workers' seed, which they do at every pass, from generators of their own.

    They would draw it from the method's, once more or less often in a run that goes on.
    """
    trainer.fit_loop.epoch_loop.val_loop.setup_data()

    def give(loader: DataLoader) -> None:
        loader.generator = loader.generator or torch.Generator()

    apply_to_collection([trainer.train_dataloader, trainer.val_dataloaders], DataLoader, give)


def _is_last(trainer) -> bool:
    """Whether this is the last step, whose validation is finished even when asked to stop: nothing comes after it."""
    return trainer.global_step >= trainer.estimated_stepping_batches


def _validate(trainer) -> None:
    """Run the validation of the restored step, as the training loop does after a step."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating, loop.restarting = True, False
    loop.run()
    # as after a checkpoint that followed its validation; else an epoch that ends here is done before its loop has
    # begun, which leaves that loop restarting, and it finds every later epoch done too, without end
    loop._has_run = False
    trainer.training = True
