"""What data modules for language policies share: the way to the policy's tokens, to batches and to training steps."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.batches import PackedPreferenceBatch, Pair, PreferenceBatch, TokenBatch
from datamodules.collation import packed_batch, padded_length, preference_batch, token_batch
from datamodules.loaders import training_loader
from datamodules.pair_packing import packed_preference_batch

PACKED_ROW = 512  # tokens of a packed row: longer ones save no padding, and dense attention costs their square


class PolicyData(L.LightningDataModule):
    """Rows as tokens of the policy that the trainer's method holds.

    A subclass sets `batch_size` (rows of a step), `packed`, `multiple` (of the tokens in a row), `seed` and `workers`.
    """

    batch_size: int
    packed: bool = False
    multiple: int = 1
    seed: int
    workers: int

    @property
    def method(self) -> Any:
        """The method that the trainer holds."""
        return self.trainer.lightning_module

    @property
    def tokenizer(self) -> Any:
        """Of the policy."""
        return self.method.policy.tokenizer

    @property
    def pad(self) -> int:
        """The token of padding."""
        return self.tokenizer.pad_token_id

    def check_room(self, max_prompt: int, max_response: int) -> None:
        """Raise ValueError where the longest row that is let in exceeds the policy's context."""
        room = self.method.policy.context
        if padded_length(max_prompt + max_response, self.multiple) > room:
            raise ValueError(
                f"data.max_prompt={max_prompt} and data.max_response={max_response} (padded to a multiple of "
                f"{self.multiple}) exceed the policy's context of {room} tokens: lower them to fit"
            )

    def check_packing(self) -> None:
        """Raise ValueError where the policy cannot keep what is packed into a row apart."""
        policy = self.method.policy
        if self.packed:
            (policy.check_sharing if self.method.batch_type is PreferenceBatch else policy.check_packing)()

    def encode_turn(self, text: str) -> list[int]:
        """Tokens of one turn of the user: through the model's chat template when it has one, else as it stands."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(text, add_special_tokens=True)
        turn = [{"role": "user", "content": text.strip()}]
        # the template writes the special tokens itself: tokenised as they stand, a second BOS cannot creep in
        rendered = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(rendered, add_special_tokens=False)

    def encode_response(self, text: str) -> list[int]:
        """Tokens of a response, the end token last: stopping is an action like any other."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    def token_batch(self, rows: Sequence[tuple[list[int], list[int]]], share: float) -> TokenBatch:
        """(prompt, response) rows, packed where that is asked for."""
        if self.packed:
            return packed_batch(rows, self.pad, share, self.multiple, self._row_room)
        return token_batch(rows, self.pad, share, self.multiple)

    def pair_batch(self, pairs: Sequence[Pair], share: float) -> PreferenceBatch | PackedPreferenceBatch:
        """Pairs, packed where that is asked for."""
        if self.packed:
            return packed_preference_batch(pairs, self.pad, share, self.multiple, self._row_room)
        return preference_batch(pairs, self.pad, share, self.multiple)

    @property
    def _row_room(self) -> int:
        return min(PACKED_ROW, self.method.policy.context)

    def training(self, rows: Sequence[tuple], cook: Callable[[list[tuple], float], Any]) -> DataLoader:
        """The steps of training on rows (prompt tokens, response tokens, ...), see `loaders.training_loader`."""
        return training_loader(rows, cook, self.trainer, self.batch_size, self.seed, self.workers)


def say(text: str) -> None:
    """A warning of process 0."""
    rank_zero_warn(text, category=UserWarning)
