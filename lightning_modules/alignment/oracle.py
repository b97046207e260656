"""Oracles: who says which of two answers to a prompt is better.

An oracle answers comparisons one by one, in any order, as soon as each is known (`compare`), so that what is known can
be kept before what is missing fails. Everything else follows from that: both orders averaged where the order matters,
tables of K answers, log-odds.
"""

import hashlib
import json
import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batches import Prompt
from lightning_modules.alignment.labelling import log_odds

TOLERANCE = 1e-3  # of P(first beats second) + P(second beats first) = 1


class Oracle(ABC):
    """P(first beats second | prompt), for any answers.

    `order_matters` says that the answer named first has an advantage (a language model as judge): both orders are then
    asked and averaged. `identity` is what the probabilities depend on, in JSON's types; labels on disk are kept by it.
    """

    order_matters: ClassVar[bool] = False

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about the probabilities."""
        return {"oracle": type(self).__name__}

    def meet(self, data: Any) -> None:  # noqa: B027 - most know all that they need
        """Look at the datamodule before training. Raises ValueError where this oracle cannot judge its answers."""

    def to(self, device: torch.device) -> None:  # noqa: B027 - most have no network
        """Where a network of its own, if it has one, is to be."""

    @abstractmethod
    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        """(row, P(first beats second)) for every row, in any order, as they become known."""

    def prefer(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Float[Tensor, " batch"]:
        """P(first beats second) in [0, 1], both orders averaged where the order matters.

        Raises ValueError, with the prompt's id, where a probability is none.
        """
        forward = self._asked(prompts, first, second)
        if not self.order_matters:
            return forward
        return (forward + 1 - self._asked(prompts, second, first)) / 2

    def score(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Float[Tensor, " batch"]:
        """The log-odds of `prefer`, finite also where it is certain."""
        return log_odds(self.prefer(prompts, first, second))

    def tables(self, prompts: list[Prompt], answers: list[list[str]]) -> list[Float[Tensor, "k k"]]:
        """For every prompt the table of its answers, asked for all prompts at once.

        Every two answers are compared once (twice where the order matters): K (K - 1) / 2 comparisons a prompt.
        """
        places = [(n, i, j) for n, texts in enumerate(answers) for i in range(len(texts)) for j in range(i)]
        known = self.prefer(
            [prompts[n] for n, _, _ in places],
            [answers[n][i] for n, i, _ in places],
            [answers[n][j] for n, _, j in places],
        )
        tables = [torch.full((len(texts), len(texts)), 0.5) for texts in answers]
        for (n, i, j), value in zip(places, known):
            tables[n][i, j], tables[n][j, i] = value, 1 - value
        return tables

    def table(self, prompt: Prompt, answers: list[str]) -> Float[Tensor, "k k"]:
        """P(answer i beats answer j), 1/2 on the diagonal."""
        return self.tables([prompt], [answers])[0]

    def _asked(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Float[Tensor, " batch"]:
        values = [math.nan] * len(prompts)
        for row, value in self.compare(prompts, first, second):
            values[row] = checked(value, prompts[row], self)
        return torch.tensor(values)


def checked(value: float, prompt: Prompt, oracle: Oracle) -> float:
    """The probability. Raises ValueError where it is outside of [0, 1] or NaN."""
    if not 0 <= value <= 1:
        raise ValueError(
            f"prompt {prompt.id}: the oracle {oracle.identity['oracle']} gives P={value}, which is no probability in "
            "[0, 1]; repair it, or leave the prompt out"
        )
    return float(value)


def consistent(forward: float, backward: float, prompt: Prompt, oracle: Oracle) -> float:
    """P(first beats second). Raises ValueError where the other order does not give one minus that."""
    if abs(forward + backward - 1) > TOLERANCE:
        raise ValueError(
            f"prompt {prompt.id}: the oracle {oracle.identity['oracle']} gives {forward:.4g} and, the answers "
            f"exchanged, {backward:.4g}, which should add up to 1; average both orders where the order matters"
        )
    return forward


class Verifier(Oracle):
    """A right answer beats a wrong one (P = 1), two of a kind are even: problems with a checkable answer."""

    def meet(self, data: Any) -> None:
        self.scorer = data.scorer
        if self.scorer is None:
            raise ValueError(
                f"oracle=verifier: the answers of data={data.name} cannot be checked; take oracle=preference or a "
                "learned one"
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {"oracle": "verifier", "scorer": self.scorer.version}

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        rows = list(zip(prompts, first, second))
        asked = dict.fromkeys((prompt.gold, text) for prompt, *texts in rows for text in texts)
        right = {(gold, text): self.scorer(text, gold).correct for gold, text in asked}
        for row, (prompt, one, other) in enumerate(rows):
            yield row, (1 + right[prompt.gold, one] - right[prompt.gold, other]) / 2


class Preference(Oracle):
    """The preference that the data was generated with: `datamodule.preference(prompt, first, second)`."""

    def meet(self, data: Any) -> None:
        self.preference, self.data = getattr(data, "preference", None), data.fingerprint
        if self.preference is None:
            raise ValueError(
                f"oracle=preference: nobody knows the true preference of data={data.name}; take oracle=verifier where "
                "answers can be checked, else a learned one"
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {"oracle": "preference", "data": self.data}

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        for row, (prompt, one, other) in enumerate(zip(prompts, first, second)):
            values = (self.preference(prompt, one, other), self.preference(prompt, other, one))
            yield row, consistent(*(checked(value, prompt, self) for value in values), prompt, self)


class Known(Oracle):
    """What the data itself knows: a `Verifier` where answers can be checked, else its true `Preference`."""

    def meet(self, data: Any) -> None:
        self.oracle: Oracle = Verifier() if data.scorer else Preference()
        self.oracle.meet(data)

    @property
    def identity(self) -> dict[str, Any]:
        return self.oracle.identity

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        return self.oracle.compare(prompts, first, second)


class Table(Oracle):
    """A given table of preferences over a few answers, the same for every prompt: tabular games.

    `preferences[i][j]` is P(answers[i] beats answers[j]); other texts than `answers` are refused.
    """

    def __init__(self, answers: list[str], preferences: list[list[float]]) -> None:
        self.answers, self.preferences = list(answers), torch.tensor(preferences, dtype=torch.float64)
        if self.preferences.shape != (len(answers), len(answers)):
            raise ValueError(f"model.oracle.preferences: {len(answers)} answers need as many rows and columns")
        if not torch.all((self.preferences >= 0) & (self.preferences <= 1)):
            raise ValueError(f"model.oracle.preferences={preferences}: these are not all probabilities in [0, 1]")
        if torch.any((self.preferences + self.preferences.T - 1).abs() > TOLERANCE):
            raise ValueError(
                f"model.oracle.preferences={preferences}: the two orders of a pair do not add up to 1; write 1 - P for "
                "the other order, and 0.5 for an answer against itself"
            )
        self._place = {text: place for place, text in enumerate(self.answers)}

    @property
    def identity(self) -> dict[str, Any]:
        return {"oracle": "table", "answers": self.answers, "preferences": self.preferences.tolist()}

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        for row, (prompt, one, other) in enumerate(zip(prompts, first, second)):
            i, j = (self._found(text, prompt) for text in (one, other))
            values = (float(self.preferences[i, j]), float(self.preferences[j, i]))
            yield row, consistent(*(checked(value, prompt, self) for value in values), prompt, self)

    def _found(self, text: str, prompt: Prompt) -> int:
        if text not in self._place:
            raise ValueError(f"prompt {prompt.id}: {text!r} is none of the answers that model.oracle.answers lists")
        return self._place[text]


class Remembered(Oracle):
    """Another oracle whose comparisons are kept on disk: none is asked twice, none that was answered is lost.

    Each comparison is a line of its own, appended when it comes to a file that nobody else writes. What is known is
    what all files of `folder` hold when this is made.
    """

    def __init__(self, oracle: Oracle, folder: Path) -> None:
        self.oracle, self.folder = oracle, folder
        self.order_matters = oracle.order_matters
        self.path = folder / f"labels-{uuid.uuid4().hex}.jsonl"
        self.known = _read(folder)

    @property
    def identity(self) -> dict[str, Any]:
        return self.oracle.identity

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> Iterator[tuple[int, float]]:
        rows = list(zip(prompts, first, second))
        keys = [_key(*row) for row in rows]
        missing = {key: row for key, row in zip(keys, rows) if key not in self.known}
        if missing:
            self._ask(missing)
        yield from ((row, self.known[key]) for row, key in enumerate(keys))

    def _ask(self, missing: Mapping[str, tuple[Prompt, str, str]]) -> None:
        keys, rows = list(missing), list(missing.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            for place, value in self.oracle.compare(*(list(column) for column in zip(*rows))):
                self.known[keys[place]] = checked(value, rows[place][0], self)
                file.write(json.dumps([keys[place], self.known[keys[place]]]) + "\n")
                file.flush()


def labels_folder(folder: Path, oracle: Oracle) -> Path:
    """Where in `folder` the labels of an oracle are kept: for all runs, whatever policy has answered."""
    text = json.dumps(oracle.identity, sort_keys=True)
    return folder / f"labels-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _key(prompt: Prompt, first: str, second: str) -> str:
    said = [(message.role, message.content) for message in prompt.messages]
    text = json.dumps([prompt.id, prompt.question, prompt.gold, said, first, second])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(folder: Path) -> dict[str, float]:
    """Comparisons by key, without the half line that a kill may have left at the end of a file."""
    known: dict[str, float] = {}
    for path in sorted(folder.glob("labels-*.jsonl")):
        for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
            try:
                known.update([json.loads(line)])
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); delete that line to ask again"
                ) from error
    return known
