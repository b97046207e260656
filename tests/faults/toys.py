"""Methods that cannot run, for the tests of refusals."""

from typing import Any, ClassVar, TypedDict

from torch import Tensor

from lightning_modules.alignment.sft import SFT


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
