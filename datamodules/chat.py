"""Conversations to answer, replies to imitate and pairs of replies to compare: real, or a generated game."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from datamodules.batches import Message, Pair, PreferenceBatch, Prompt, PromptBatch, TokenBatch
from datamodules.chat_sets import find_conversations
from datamodules.chat_templates import ChatTemplate
from datamodules.collation import preference_batch, token_batch
from datamodules.conversations import Conversation, Defect, Ledger
from datamodules.loaders import prompt_loader
from datamodules.policy_data import PolicyData, say

ROWS_AT_ONCE = 16  # held-out rows of a batch
TURNS = ("script", "last")

Encoded = tuple[Conversation, list[int], list[list[int]]]  # with the tokens of its prompt and of its replies


class Chat(PolicyData):
    """Conversations as the method asks for them.

    The rows are read when the module is made, so that a bad file is refused before a model is loaded. `TokenBatch` is
    the better replies; `PreferenceBatch` is the pairs as they are given, or those that the method makes of its own
    answers to the prompts; validation and test are a loader of prompts and one of held-out rows (one for each subset
    of a benchmark, named in `subsets` by the number of the loader).

    With `turns="script"` a dialogue whose turns of the user are known beforehand is a prompt of its first turn, and the
    policy's own replies come between the others; with `"last"` the replies that are given do.
    """

    serves: ClassVar[tuple[type, ...]] = (TokenBatch, PromptBatch, PreferenceBatch)
    scorer = None  # no answer can be checked

    def __init__(
        self,
        name: str,
        path: str | None,
        download: bool,
        turns: str,
        template: str | None,
        limit: int | None,
        held_out: float,
        val_size: int,
        batch_size: int,
        packed: bool,
        pad_to_multiple: int,
        max_prompt: int,
        max_response: int,
        drop_ties: bool,
        standin: dict[str, Any],
        on_error: str,
        seed: int,
        workers: int,
        cache: str,
    ) -> None:
        super().__init__()
        if turns not in TURNS:
            raise ValueError(f"data.turns={turns}: there are {', '.join(TURNS)}")
        self.turns, self.template_name, self.on_error = turns, template, on_error
        self.batch_size, self.packed, self.multiple = batch_size, packed, pad_to_multiple
        self.max_prompt, self.max_response, self.drop_ties = max_prompt, max_response, drop_ties
        self.seed, self.workers, self.cache = seed, workers, Path(cache)
        sizes = {"held_out": held_out, "val_size": val_size, "seed": seed}
        self.source = find_conversations(name, path, download, standin=dict(standin), on_error=on_error, **sizes)
        self.name, self.standin, self.preference = self.source.name, self.source.standin, self.source.preference
        self.parts = {part: _first_openings(rows, limit) for part, rows in self.source.parts.items()}
        if not self.parts["test"]:
            say(f"{self.source.origin} has too few rows for a test: the validation rows are tested")
            self.parts["test"] = self.parts["val"]
        self.pairs: list[Pair] = []
        self.subsets = _subsets([*self.parts["val"], *self.parts["test"]])
        self._held_out: dict[str, list[DataLoader]] = {}

    @property
    def fingerprint(self) -> str:
        """What the rows are: digests of the files, or the generator's parameters."""
        return self.source.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about sampled answers beside prompts, policy and sampler."""
        return {"data": self.fingerprint, "template": self.template.template}

    # From text to tokens

    def setup(self, stage: str) -> None:
        self.check_room(self.max_prompt, self.max_response)
        if stage == "fit":
            self.check_packing()
        self.template = ChatTemplate(self.tokenizer, self.template_name, self.method.policy.stop_ids)
        self.val, self.test = self._prompts("val"), self._prompts("test")
        self._index = {prompt.id: number for part in (self.val, self.test) for number, prompt in enumerate(part)}

    def index(self, prompt: Prompt) -> int:
        """The number of a prompt in its part."""
        return self._index[prompt.id]

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation up to where the assistant's next reply begins."""
        return self.template.prompt(messages)

    def encode_replies(self, messages: Sequence[Message], replies: Sequence[str]) -> list[list[int]]:
        """Tokens of replies to a conversation, each with the token that ends it."""
        return self.template.encode(messages, replies)[1]

    def _prompts(self, part: str) -> list[Prompt]:
        """Every prompt of a part once, whatever the number of its replies; `gold` is the best one that is known."""
        rows = {(row.messages, row.script): row for row in reversed(self._to_answer(part))}
        encoded = self._encoded(f"{part} prompts", list(reversed(rows.values())), replies=False)
        better = {row.messages: row.replies[_better(row)] for row in self.parts[part] if len(row.replies) == 2}
        golds = [_reference(row) or better.get(row.messages, "") for row, _, _ in encoded]
        return [
            Prompt(row.id, row.messages[-1].content, gold, ids, row.messages, row.script)
            for (row, ids, _), gold in zip(encoded, golds)
        ]

    def _to_answer(self, part: str) -> list[Conversation]:
        """With a script or without any reply, where there are such; or those that have replies."""
        open_ended = [row for row in self.parts[part] if not row.replies]
        answered = [row for row in self.parts[part] if row.replies]
        return (open_ended or answered) if self.turns == "script" else (answered or open_ended)

    def _encoded(self, what: str, rows: list[Conversation], replies: bool = True) -> list[Encoded]:
        """Rows with their tokens; what does not fit is left out, in one line that counts the reasons."""
        kept, dropped, ledger = [], Counter(), Ledger(self.on_error)
        for row in rows:
            try:
                encoded = self._encode(row, row.replies if replies else ())
            except Defect as error:
                ledger.note(error)
                continue
            except ValueError as error:
                ledger.note(ValueError(f"{self._where(row)}: {error}"), "the chat template cannot write it")
                continue
            if reason := self._too_long(encoded):
                dropped[reason] += 1
            else:
                kept.append(encoded)
        if counts := dropped + ledger.counts:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.items())
            say(f"{self.name}: {counts.total()} of {len(rows)} {what} left out: {reasons}")
        return kept

    def _encode(self, row: Conversation, replies: Sequence[str]) -> Encoded:
        if token := self.template.refused([*(message.content for message in row.messages), *replies]):
            raise Defect(self._where(row), f"the text spells the special token {token}", "delete the row")
        return row, *self.template.encode(row.messages, replies)

    def _where(self, row: Conversation) -> str:
        return f"{self.source.origin}, row {row.id}"

    def _too_long(self, encoded: Encoded) -> str | None:
        _, prompt, replies = encoded
        if len(prompt) > self.max_prompt:
            return f"prompt over data.max_prompt={self.max_prompt}"
        if any(len(reply) > self.max_response for reply in replies):
            return f"response over data.max_response={self.max_response}"
        if len(replies) == 2 and self._read(len(prompt), [*map(len, replies)]) > self.method.policy.context:
            return f"both responses behind the prompt over the policy's context of {self.method.policy.context}"
        return None

    def _read(self, prompt: int, replies: list[int]) -> int:
        """Tokens of the longest sequence that the method reads of a pair: most read each reply by itself."""
        length = getattr(self.method, "length", None)
        return length(prompt, replies) if length else prompt + max(replies)

    # Training

    def train_dataloader(self) -> DataLoader:
        for part in ("val", "test"):
            self._held_out_rows(part)  # as long as the policy is the one that its reference is
        return {TokenBatch: self._imitated, PreferenceBatch: self._compared}[self.method.batch_type]()

    def _imitated(self) -> DataLoader:
        return self.training(self._better_replies("train"), self.token_batch)

    def _better_replies(self, part: str) -> list[tuple[list[int], list[int]]]:
        """(prompt, reply) tokens; a tie has no better reply."""
        rows = [row for row in self.parts[part] if row.replies and row.label != 0.5]
        if not rows and part == "train":
            raise ValueError(
                f"{self.source.origin} has no reply to imitate: take data with replies, or a policy=... that "
                "needs no start"
            )
        return [(ids, replies[_better(row)]) for row, ids, replies in self._encoded(f"{part} replies", rows)]

    def _compared(self) -> DataLoader:
        if self.method.labels:
            self.pairs = self.method.iterate(self._prompts("train"), self.identity, self.cache)
        else:
            self.pairs = self.pairs or self._with_reference(self._given_pairs("train"))
        rows = [(pair.prompt_ids, [*pair.responses[0], *pair.responses[1]], pair) for pair in self.pairs]
        return self.training(rows, lambda chosen, share: self.pair_batch([row[2] for row in chosen], share))

    def _given_pairs(self, part: str, subset: str | None = None) -> list[Pair]:
        """The pairs of a part, the better reply first."""
        rows = [row for row in self.parts[part] if len(row.replies) == 2 and subset in (None, row.subset)]
        if not rows and part == "train":
            raise ValueError(
                f"{self.source.origin} has no pairs to learn from: take a method that makes its own (model="
                "sppo), or data with chosen and rejected replies"
            )
        what = f"{part} pairs" if subset is None else f"{part} pairs of {subset}"
        decided = [row for row in rows if row.label != 0.5 or not self.drop_ties]
        if len(decided) < len(rows):
            say(f"{self.name}: {len(rows) - len(decided)} of {len(rows)} {what} are ties: left out")
        return [_pair(*encoded) for encoded in self._encoded(what, decided)]

    def _with_reference(self, pairs: list[Pair]) -> list[Pair]:
        wanted = pairs and self.method.batch_type is PreferenceBatch
        return self.method.with_reference(pairs, self.cache) if wanted else pairs

    # Evaluation

    def val_dataloader(self) -> list[DataLoader]:
        return [prompt_loader(self.val, self.trainer), *self._held_out_rows("val")]

    def test_dataloader(self) -> list[DataLoader]:
        return [prompt_loader(self.test, self.trainer), *self._held_out_rows("test")]

    def predict_dataloader(self) -> DataLoader:
        return prompt_loader(self.test, self.trainer)

    def _held_out_rows(self, part: str) -> list[DataLoader]:
        """All of them on every process, whose networks may be sharded: pairs, or for SFT without any the replies."""
        if part not in self._held_out:
            paired = any(len(row.replies) == 2 for row in self.parts[part])
            names = self.subsets[1:] or (None,)
            made = [self._pair_loader(self._given_pairs(part, name)) for name in names if paired]
            imitates = self.method.batch_type is TokenBatch
            self._held_out[part] = made or (self._reply_loader(part) if imitates else [])
        return self._held_out[part]

    def _pair_loader(self, pairs: list[Pair]) -> DataLoader:
        ordered = sorted(
            self._with_reference(pairs), key=lambda pair: sum(map(len, (pair.prompt_ids, *pair.responses)))
        )
        return DataLoader([preference_batch(part, self.pad, 1.0) for part in _cut(ordered)], batch_size=None)

    def _reply_loader(self, part: str) -> list[DataLoader]:
        rows = sorted(self._better_replies(part), key=lambda row: len(row[0]) + len(row[1]))
        batches = [token_batch(some, self.pad, float(sum(len(reply) for _, reply in some))) for some in _cut(rows)]
        return [DataLoader(batches, batch_size=None)] if batches else []


def _first_openings(rows: list[Conversation], limit: int | None) -> list[Conversation]:
    """The conversations with the first `limit` openings, all of what begins alike together."""
    kept = set(list(dict.fromkeys(row.opening for row in rows))[:limit])
    return [row for row in rows if row.opening in kept]


def _subsets(rows: list[Conversation]) -> tuple[str, ...]:
    """The names of evaluation's loaders, where pairs come by subset."""
    names = sorted({row.subset for row in rows if len(row.replies) == 2})
    return ("prompts", *names) if len(names) > 1 else ()


def _reference(row: Conversation) -> str:
    return row.replies[0] if len(row.replies) == 1 else row.gold


def _better(row: Conversation) -> int:
    return int(row.label < 0.5)


def _pair(row: Conversation, prompt: list[int], replies: list[list[int]]) -> Pair:
    first, second = replies
    if _better(row) == 0:
        return Pair(row.id, prompt, (first, second), row.label, row.value)
    value = row.value and (row.value[1], row.value[0])
    return Pair(row.id, prompt, (second, first), 1 - row.label, value)


def _cut(rows: list[Any]) -> list[list[Any]]:
    return [rows[i : i + ROWS_AT_ONCE] for i in range(0, len(rows), ROWS_AT_ONCE)]
