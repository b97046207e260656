"""Text as windows of tokens, for language modelling: files, shards, the hub, or the stand-in."""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import lightning as L
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import WindowBatch
from datamodules.loaders import batch_loader
from datamodules.shards import Stream
from datamodules.steps import FromStep
from datamodules.text_sources import find_text
from datamodules.tokenizers import Tokenizer, make_tokenizer
from datamodules.windows import EvalWindows, TrainWindows

log = logging.getLogger(__name__)

SAMPLED = 2**23  # tokens of a part, at most, in which bytes are counted


class Text(L.LightningDataModule):
    """A stream of tokens cut into windows, train, val and test; without a test part, val is tested.

    The tokens are found when the module is made, so that a bad file is refused before a model is built. Raises
    FileNotFoundError or ValueError in one sentence. `vocab_size` is the given one, or what the tokenizer or the format
    of the shards has.
    """

    serves: ClassVar[tuple[type, ...]] = (WindowBatch,)

    def __init__(
        self,
        path: str | None,
        tokenizer: str,
        tokenizer_files: str | None,
        vocab_size: int | None,
        column: str,
        val_fraction: float,
        limit: int | None,
        eval_tokens: int | None,
        context: int,
        batch_size: int,
        document_mask: bool,
        align: bool,
        download: bool,
        hub: str | None,
        hub_config: str | None,
        hub_tokens: int,
        seed: int,
        workers: int,
        cache: str,
    ) -> None:
        super().__init__()
        for key, value in {"context": context, "batch_size": batch_size, "hub_tokens": hub_tokens}.items():
            if value < 1:
                raise ValueError(f"data.{key}={value} must be positive")
        self.context, self.batch_size, self.seed, self.workers = context, batch_size, seed, workers
        self.document_mask, self.align = document_mask, align
        self.source = find_text(
            path,
            lambda: make_tokenizer("bytes" if tokenizer == "auto" else tokenizer, tokenizer_files),
            hub={"name": hub, "config": hub_config, "tokens": hub_tokens, "download": download},
            column=column,
            val_fraction=val_fraction,
            cache=Path(cache),
        )
        self.name, self.standin = self.source.name, self.source.standin
        # of tokens, `auto` is that of their format, made only when it is to show text
        self._make_tokenizer = lambda: make_tokenizer("gpt2" if tokenizer == "auto" else tokenizer, tokenizer_files)
        if tokenizer_files:
            self._make_tokenizer()  # what is wrong with them is said now, and not when training is over
        known = self.source if self.source.tokenizer or tokenizer == "auto" else self.tokenizer
        self.end, self.vocab_size = known.end, vocab_size or known.vocab_size
        self._check_vocabulary()
        self._check_documents()
        self.parts = self._limited(limit, eval_tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is read: of the contents; of more than 1 GB of shards, of sizes and sampled blocks."""
        return self.source.fingerprint

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens, or shows them: of files of tokens GPT-2's unless another one is named."""
        return self.source.tokenizer or self._make_tokenizer()

    def _check_vocabulary(self) -> None:
        token, where = self.source.largest or (self.source.vocab_size - 1, self.source.origin)
        if token >= self.vocab_size:
            raise ValueError(
                f"{where} has the token {token}, beyond a vocabulary of {self.vocab_size}: it is for another "
                f"tokenizer, or set data.vocab_size to more than {token}"
            )

    def _check_documents(self) -> None:
        if self.end is None and (self.document_mask or self.align):
            key = "document_mask" if self.document_mask else "align"
            raise ValueError(
                f"data.{key}=true needs an end-of-text token between documents, and there is none: take "
                "data.tokenizer=gpt2"
            )

    def _limited(self, limit: int | None, eval_tokens: int | None) -> dict[str, Stream]:
        """The parts, cut to `limit` windows, val and test also to `eval_tokens` targets; each has a whole window."""
        parts = {**self.source.parts, "test": self.source.parts.get("test", self.source.parts["val"])}
        for part, stream in parts.items():
            if len(stream) <= self.context:
                raise ValueError(
                    f"{self.source.origin}: the {part} part has {len(stream)} tokens, and a window of "
                    f"data.context={self.context} needs {self.context + 1}: give more text, or lower data.context"
                )
            cuts = [limit and limit * self.context, part != "train" and eval_tokens]
            parts[part] = stream.part(0, min([len(stream), *(max(cut, self.context) + 1 for cut in cuts if cut)]))
        return parts

    # Text and tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer.encode(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; those beyond the tokenizer's vocabulary stand for nothing.

        Where shards are trained on without their tokenizer at hand, the numbers of the tokens.
        """
        try:
            self.tokenizer  # noqa: B018
        except (FileNotFoundError, ValueError) as error:
            log.warning("samples show the numbers of tokens: %s", error)
            return " ".join(map(str, ids))
        return self.tokenizer.decode([id for id in ids if id < self.tokenizer.vocab_size])

    @property
    def tokens_per_step(self) -> int:
        """Targets of an optimizer step, over all processes."""
        return self.batch_size * self.context

    def prompts(self, count: int, length: int) -> Int[Tensor, "count length"]:
        """Beginnings for a model to go on from: `length` tokens from places spread evenly over the test part."""
        stream = self.parts["test"]
        last = max(0, len(stream) - length)
        begins = [last * place // max(1, count) for place in range(count)]
        return torch.stack([torch.from_numpy(stream.read(b, b + length).astype(np.int64)) for b in begins])

    def bytes_per_token(self, part: str) -> float | None:
        """UTF-8 bytes of text over tokens of a part (of its first eight million); None where no tokenizer is known."""
        counted = self.parts[part].part(0, SAMPLED)
        try:
            lengths = [self.tokenizer.text_bytes(chunk) for chunk in counted.chunks()]
        except (FileNotFoundError, ValueError, IndexError):
            return None
        return sum(lengths) / len(counted)

    def unigram_entropy(self, part: str) -> float:
        """Entropy in nats of a token of a part drawn by itself: what a model that ignores the context can reach."""
        counts = self.parts[part].histogram(self.vocab_size)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    # Loaders

    def train_dataloader(self) -> DataLoader:
        windows = TrainWindows(
            self.parts["train"],
            self.context,
            self.batch_size,
            self.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
            end=self.end,
            document_mask=self.document_mask,
            align=self.align,
        )
        return batch_loader(windows, FromStep(windows, lambda: self.trainer.global_step), self.workers, self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._whole("val")

    def test_dataloader(self) -> DataLoader:
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader:
        return self._whole("test")

    def _whole(self, part: str) -> DataLoader:
        world = self.trainer.world_size
        rows = max(1, self.batch_size // (world * self.trainer.accumulate_grad_batches))
        windows = EvalWindows(
            self.parts[part], self.context, rows, self.trainer.global_rank, world, self.end, self.document_mask
        )
        return batch_loader(windows, range(len(windows)), self.workers, self.seed)
