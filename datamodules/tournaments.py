"""Symbolic tournaments: short answers whose true preferences are known, cycles among them.

They stand in for the cyclic data sets of the GPM paper (arXiv 2410.02197, section 6.1), which were not released. A
prompt names a hidden tournament, a skew-symmetric table S of log-odds between items; an answer is an item in one of
many wordings. The same items appear in every tournament, so that the prompt has to be read.
"""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import Pair, PreferenceBatch, Prompt
from datamodules.collation import padded_length
from datamodules.policy_data import PolicyData

LABELS = ("hard", "soft", "sampled")
BRUTE_FORCE = 7  # items of which all orders are tried
PROMPT = "Problem {number}: What is more?\n"
WORDING = "{name} has {item} {thing}."
NAMES = ["Tom", "Ana", "Ben", "Mia", "Leo", "Zoe", "Sam", "Eva"]
THINGS = ["apples", "books", "coins", "pens", "cards", "stamps"]
PAIRS_AT_ONCE = 64


@dataclass
class Tournament:
    """A hidden table: `log_odds[i, j]` (nats) of item i beating item j, and how its prompt reads."""

    kind: str
    number: int
    log_odds: Float[Tensor, "n n"]
    prompt_ids: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)  # a held-out wording of each item, as tokens

    @property
    def id(self) -> str:
        """Its name, also that of its prompt."""
        return f"{self.kind}-{self.number}"

    @property
    def names(self) -> list[str]:
        """Of the items."""
        return [str(item) for item in range(len(self.log_odds))]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The pairs (i, j), i < j, of which one is better."""
        return [(i, j) for i, j in itertools.combinations(range(len(self.log_odds)), 2) if self.log_odds[i, j] != 0]

    @property
    def ceiling(self) -> float:
        """The accuracy of the best order of the items, which no scalar model exceeds; NaN where it is not known."""
        n = len(self.log_odds)
        if self.kind == "order":
            return 1.0
        if n > BRUTE_FORCE:
            return (n - 1) / n if self.kind == "cycle" else math.nan
        orders = (dict(zip(order, range(n))) for order in itertools.permutations(range(n)))
        right = max(sum((self.log_odds[i, j] > 0) == (o[i] < o[j]) for i, j in self.edges) for o in orders)
        return float(right) / len(self.edges)


def cycle(n: int, strength: float) -> Float[Tensor, "n n"]:
    """Each item beats the next one, the last one the first; what is not next to each other is even."""
    table = torch.zeros(n, n)
    for i in range(n):
        table[i, (i + 1) % n] += strength
        table[(i + 1) % n, i] -= strength
    return table


def order(n: int, strength: float) -> Float[Tensor, "n n"]:
    """Transitive: log-odds `strength` for each place between two items."""
    place = torch.arange(n) * strength
    return place - place[:, None]


def dominant(n: int, strength: float) -> Float[Tensor, "n n"]:
    """A cycle of n - 1 items below one that beats all of them."""
    table = torch.zeros(n, n)
    table[:-1, :-1] = cycle(n - 1, strength)
    table[-1, :-1], table[:-1, -1] = strength, -strength
    return table


def skew(n: int, strength: float, seed: int) -> Float[Tensor, "n n"]:
    """Random log-odds, N(0, strength^2) above the diagonal."""
    above = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).triu(1) * strength
    return above - above.T


KINDS: dict[str, Callable[..., Tensor]] = {"cycle": cycle, "order": order, "dominant": dominant, "random": skew}
SMALLEST = {"cycle": 3, "order": 2, "dominant": 4, "random": 2}


@dataclass(frozen=True)
class Generated:
    """Where the pairs come from, as a run's report says it."""

    origin: str = "symbolic tournaments"


class Tournaments(PolicyData):
    """Pairs of short answers in tournaments of several kinds, `{kind: [how many, items in each]}`.

    Kinds are cycle, order, dominant (a cycle below an item that beats it) and random. Training labels are `hard` (1 or
    0), `soft` (the probability itself) or `sampled` from it; held-out pairs, in wordings that training does not have,
    carry hard labels, or else the probability. `subsets` are the kinds, a validation loader for each.
    """

    serves: ClassVar[tuple[type, ...]] = (PreferenceBatch,)
    name, standin, source, scorer = "tournaments-standin", True, Generated(), None

    def __init__(
        self,
        tournaments: dict[str, list[int]],
        strength: float,
        label: str,
        pairs: int,
        held_out: int,
        limit: int | None,
        batch_size: int,
        max_prompt: int,
        max_response: int,
        seed: int,
        workers: int,
        download: bool,
        cache: str,
    ) -> None:
        super().__init__()
        _check(tournaments, strength, label)
        self.kinds = {kind: tuple(size) for kind, size in tournaments.items() if size and size[0]}
        self.strength, self.label = strength, label
        self.count, self.held_out = (min(many, limit or many) for many in (pairs, held_out))
        self.batch_size, self.seed, self.workers, self.cache = batch_size, seed, workers, Path(cache)
        self.tournaments = list(self._drawn())
        self.subsets = tuple(self.kinds)
        self.pairs: list[Pair] = []
        self._tokens: dict[tuple[int, tuple[str, str]], list[int]] = {}

    @property
    def fingerprint(self) -> str:
        """The generator's parameters."""
        known = [self.kinds, self.strength, self.label, self.count, self.held_out, self.seed, PROMPT, WORDING]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    @property
    def ceilings(self) -> dict[str, float]:
        """For every kind the mean accuracy that no scalar model exceeds."""
        found = {kind: [t.ceiling for t in self.tournaments if t.kind == kind] for kind in self.kinds}
        return {kind: sum(values) / len(values) for kind, values in found.items()}

    def _drawn(self) -> Any:
        """The tournaments, each with its items in a random order of its own."""
        numbers = itertools.count()
        for kind, (many, items) in self.kinds.items():
            for _ in range(many):
                number = next(numbers)
                own = {"seed": self.seed * 1_000 + number} if kind == "random" else {}
                table = KINDS[kind](items, self.strength, **own)
                shuffled = torch.randperm(items, generator=torch.Generator().manual_seed(self.seed * 1_000 + number))
                yield Tournament(kind, number, table[shuffled][:, shuffled])

    # From items to tokens

    def setup(self, stage: str) -> None:
        wordings = [(name, thing) for name in NAMES for thing in THINGS]
        random.Random(self.seed).shuffle(wordings)
        parts = {"train": wordings[:36], "val": wordings[36:42], "test": wordings[42:]}
        rng, self._tokens = random.Random(self.seed), {}
        for tournament in self.tournaments:
            tournament.prompt_ids = self.encode_turn(PROMPT.format(number=tournament.number))
            tournament.answers = [self._encode(item, parts["val"][0]) for item in range(len(tournament.log_odds))]
        self.parts = {
            part: {kind: self._sampled(kind, part, rng, parts[part]) for kind in self.kinds} for part in parts
        }
        longest = max(len(p.prompt_ids) + max(map(len, p.responses)) for p in self._all("train"))
        if padded_length(longest, 1) > self.method.policy.context:
            raise ValueError(
                f"tournaments: an answer with its prompt has {longest} tokens, and the policy's context is "
                f"{self.method.policy.context}: take a policy with more"
            )

    def _encode(self, item: int, wording: tuple[str, str]) -> list[int]:
        if (item, wording) not in self._tokens:
            text = WORDING.format(name=wording[0], item=item, thing=wording[1])
            self._tokens[item, wording] = self.encode_response(text)
        return self._tokens[item, wording]

    def _sampled(self, kind: str, part: str, rng: random.Random, wordings: Sequence[tuple[str, str]]) -> list[Pair]:
        """Pairs of a kind: training samples them, what is held out goes through all edges in turn."""
        edges = [(t, edge) for t in self.tournaments if t.kind == kind for edge in t.edges]
        if part == "train":
            count = self.count * sum(t.kind == kind for t in self.tournaments) // len(self.tournaments)
            chosen = [rng.choice(edges) for _ in range(count)]
        else:
            chosen = [edges[i % len(edges)] for i in range(max(self.held_out // len(self.kinds), len(edges)))]
        return [self._pair(tournament, edge, part, rng, wordings) for tournament, edge in chosen]

    def _pair(
        self,
        tournament: Tournament,
        edge: tuple[int, int],
        part: str,
        rng: random.Random,
        wordings: Sequence[tuple[str, str]],
    ) -> Pair:
        i, j = rng.sample(edge, 2)  # which one stands first says nothing
        probability = float(torch.sigmoid(tournament.log_odds[i, j]))
        label = probability
        if self.label == "hard":
            label = float(probability > 0.5)
        elif self.label == "sampled" and part == "train":
            label = float(rng.random() < probability)
        responses = tuple(self._encode(item, rng.choice(wordings)) for item in (i, j))
        return Pair(tournament.id, tournament.prompt_ids, responses, label)

    def _all(self, part: str) -> list[Pair]:
        return [pair for pairs in self.parts[part].values() for pair in pairs]

    # Loaders

    def train_dataloader(self) -> DataLoader:
        self.pairs = self.method.with_reference(self._all("train"), self.cache)
        rows = [(pair.prompt_ids, max(pair.responses, key=len), pair) for pair in self.pairs]
        return self.training(rows, lambda chosen, share: self.pair_batch([row[2] for row in chosen], share))

    def val_dataloader(self) -> list[DataLoader]:
        return self._judged("val")

    def test_dataloader(self) -> list[DataLoader]:
        return self._judged("test")

    def _judged(self, part: str) -> list[DataLoader]:
        """A loader for each kind, all of it on every process: their networks may be sharded."""
        loaders = []
        for pairs in self.parts[part].values():
            cut = [pairs[i : i + PAIRS_AT_ONCE] for i in range(0, len(pairs), PAIRS_AT_ONCE)]
            loaders.append(DataLoader([self.pair_batch(some, 1.0) for some in cut], batch_size=None))
        return loaders

    def preference(self, prompt: Prompt, first: str, second: str) -> float:
        """The exact P(first beats second)."""
        table = next(t for t in self.tournaments if t.id == prompt.id).log_odds
        i, j = (int(text.split()[2]) for text in (first, second))
        return float(torch.sigmoid(table[i, j]))


def _check(tournaments: dict[str, list[int]], strength: float, label: str) -> None:
    if label not in LABELS:
        raise ValueError(f"data.label={label}: there are {', '.join(LABELS)}")
    if strength <= 0:
        raise ValueError(f"data.strength={strength}: log-odds above 0, such as 4")
    for kind, size in tournaments.items():
        if kind not in KINDS:
            raise ValueError(f"data.tournaments.{kind}: there are {', '.join(KINDS)}")
        if size and size[0] and not SMALLEST[kind] <= size[1] <= 100:
            raise ValueError(f"data.tournaments.{kind}=[{size[0]}, {size[1]}]: from {SMALLEST[kind]} to 100 items")
    if not any(size and size[0] for size in tournaments.values()):
        raise ValueError("data.tournaments names no tournament: give one, such as {cycle: [4, 3]}")
