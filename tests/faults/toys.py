"""Methods that cannot run, or not to their end, for the tests of refusals and faults."""

import os
import signal
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict

from torch import Tensor

from lightning_modules.alignment.sft import SFT
from tessera import sharded


class Frozen(SFT):
    """Nothing in it is trainable."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.policy.requires_grad_(False)


class BackboneBatch(TypedDict):
    """A kind of batch that word problems do not come in."""

    frames: Tensor


class Folding(SFT):
    """A method of another field."""

    batch_type: ClassVar[type] = BackboneBatch


class DiesWhileSaving(SFT):
    """Process 1 is killed when it has written its part of the checkpoint of step $DIES_AT."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if checkpoint["global_step"] == int(os.environ.get("DIES_AT", -1)) and self.global_rank == 1:
            sharded.write_parts = dying_after(sharded.write_parts)


def dying_after(act: Callable) -> Callable:
    """`act`, and then the end."""

    def die(*arguments: Any) -> None:
        act(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    return die
