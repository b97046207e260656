"""Progress on the screen: a bar with the headline metric, or plain lines where nobody watches a terminal."""

import sys
import time
from typing import Any

from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

SHOWN = ("loss", "greedy", "sampled", "auc", "units_per_s", "tokens_per_s")


def _shown(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics one looks at; the word stand-in stays where it is."""
    return {
        name.removeprefix("train/").removeprefix("throughput/"): float(value)
        for name, value in metrics.items()
        if name.rsplit("/")[-1] in SHOWN and not name.startswith("test")
    }


class Bar(RichProgressBar):
    """Lightning's Rich bar, over all steps instead of those of an epoch, with only what one looks at."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=10, theme=RichProgressBarTheme(metrics_format=".4g"))
        self.run_name = name

    @property
    def total_train_batches(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def _get_train_description(self, current_epoch: int) -> str:
        return self.run_name

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer, pl_module):
        return _shown(super().get_metrics(trainer, pl_module) | trainer.callback_metrics)


class Lines(ProgressBar):
    """A line every ten seconds: step, time left, what is shown beside a bar."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.run_name = name
        self._began = self._last = time.monotonic()
        self._first_step = 0

    def disable(self) -> None:
        self._last = float("inf")

    def on_train_start(self, trainer, pl_module) -> None:
        self._began = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        if not trainer.is_global_zero or (time.monotonic() - self._last < 10 and step < total):
            return
        self._last = time.monotonic()
        left = (self._last - self._began) / max(1, step - self._first_step) * (total - step)
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in _shown(trainer.callback_metrics).items())
        print(f"{self.run_name}  step {step}/{total}  {left:.0f} s left  {metrics}", flush=True)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._evaluated(trainer, "validation", batch_idx, trainer.num_val_batches, dataloader_idx)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._evaluated(trainer, "test", batch_idx, trainer.num_test_batches, dataloader_idx)

    def _evaluated(self, trainer, stage: str, batch_idx: int, totals: list[int | float], dataloader_idx: int) -> None:
        if trainer.is_global_zero and time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            print(f"{self.run_name}  {stage} {batch_idx + 1}/{totals[dataloader_idx]}", flush=True)


def progress_bar(name: str) -> Callback:
    """The bar for a terminal, the lines for a file."""
    return Bar(name) if sys.stdout.isatty() else Lines(name)
