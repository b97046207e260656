"""A generated game of several turns with a known preference that has a cyclic part, for when no data is at hand.

In every turn the user wants one thing and does not want another ("17. Find coins, the pens are lost."), and a reply is
a name and a few things ("Tom coins books"). The names beat each other in a biased rock-paper-scissors; the things are
worth what the user said of them. At `cyclic=1` and two turns this is RPS-2, whose Nash policy is known.
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from datamodules.batches import Message, Prompt
from datamodules.conversations import Conversation, turns_of

VERSION = 1  # part of every fingerprint: raise it when the text for a seed changes
NAMES = ("Tom", "Ana", "Ben")
THINGS = ("apples", "books", "coins", "pens", "cards", "stamps")
PHRASES = (
    "Find {wanted}, the {lost} are lost.",
    "So {lost} are lost, get {wanted}.",
    "Now {wanted} are left, {lost} are lost.",
)
NUMBERS = 100  # the user's turns are numbered, so that there are enough of them; the number means nothing
MALFORMED = len(NAMES)
NAMED = 0.8  # with less, imitation does not find out in a minute that replies speak of what the user spoke of

Triple = tuple[float, float, float]
FIRST_TURN: Triple = (0.6, 0.4, 0.8)  # K of r_1 = 1/2 + 1/2 K
LATER_TURNS: Triple = (0.5, 0.5, 1.0)  # r_h = 1/2 + 1/4 K[reply, reply'] ...
BEFORE: Triple = (0.4, 0.0, 0.8)  # ... + 1/4 K[own reply before, the other's own reply before]


def payoff(constants: Triple, first: int, second: int) -> float:
    """K(a, b, c)[first, second] = [[0, -a, b], [a, 0, -c], [-b, c, 0]]; a malformed reply has -1 with the others."""
    a, b, c = constants
    if MALFORMED in (first, second):
        return float((second == MALFORMED) - (first == MALFORMED))
    return ((0.0, -a, b), (a, 0.0, -c), (-b, c, 0.0))[first][second]


@dataclass(frozen=True)
class Reply:
    """What counts of a reply: which name it plays (3 when it is malformed), and what its things are worth."""

    name: int
    worth: int


Chances = Callable[[list[tuple[Message, ...]]], list[list[float]]]
# how likely (the reply in the turn before, the reply) are
Played = Mapping[tuple[Reply | None, Reply], float]


@dataclass(frozen=True)
class GamePreference:
    """The true preference: P(first beats second), antisymmetric, `cyclic` r + (1 - `cyclic`) sigmoid(`strength` dw).

    r is the table of the turn (RPS-2 of arXiv 2502.12678's setting: the first turn compares names, later ones names and
    the names played before), dw the difference of worths: +1 for every wanted thing, -1 for every lost one. A reply
    is well formed when it is one of the names, then 1 to `things` things; a malformed one loses to it for certain, and
    two malformed ones are a tie.
    """

    cyclic: float = 0.5
    strength: float = 1.0
    things: int = 2

    def __call__(self, prompt: Prompt, first: str, second: str) -> float:
        """P(first beats second) after the messages of the prompt.

        Both are a reply, or the rest of a conversation as `conversations.continued` writes it: then the mean over its
        turns, each judged with the replies before it. A conversation that is broken off goes on malformed.
        """
        stages = self.stages(prompt.messages, first, second)
        return sum(stages) / len(stages)

    def stages(self, messages: Sequence[Message], first: str, second: str) -> list[float]:
        """P(first beats second) in every turn of two rests of a conversation."""
        replies, users = zip(turns_of(first), turns_of(second))
        asked = [messages[-1].content, *max(users, key=len)]
        said = [message.content for message in messages if message.role == "assistant"]
        before = [self.read(messages[-3].content, said[-1])] * 2 if said else None
        found = []
        for user, pair in zip(asked, itertools.zip_longest(*replies, fillvalue="")):
            now = [self.read(user, reply) for reply in pair]
            found.append(self.stage(now[0], now[1], before))
            before = now
        return found

    def stage(self, first: Reply, second: Reply, before: Sequence[Reply] | None) -> float:
        """P(first beats second) in one turn; `before` are both sides' own replies in the turn before, if any."""
        if MALFORMED in (first.name, second.name):
            return 0.5 + payoff(FIRST_TURN, first.name, second.name) / 2
        if before is None:
            cycle = 0.5 + payoff(FIRST_TURN, first.name, second.name) / 2
        else:
            cycle = 0.5 + payoff(LATER_TURNS, first.name, second.name) / 4
            cycle += payoff(BEFORE, before[0].name, before[1].name) / 4
        order = 1 / (1 + math.exp(-self.strength * (first.worth - second.worth)))
        return self.cyclic * cycle + (1 - self.cyclic) * order

    def read(self, user: str, reply: str) -> Reply:
        """What counts of a reply to that turn of the user."""
        name, *things = reply.split(" ")
        if name not in NAMES or not 1 <= len(things) <= self.things or any(thing not in THINGS for thing in things):
            return Reply(MALFORMED, 0)
        wanted, lost = _asked(user)
        return Reply(NAMES.index(name), things.count(wanted) - things.count(lost))

    def replies(self) -> list[str]:
        """All well-formed replies."""
        counts = range(1, self.things + 1)
        endings = itertools.chain.from_iterable(itertools.product(THINGS, repeat=count) for count in counts)
        return [" ".join([name, *things]) for things in endings for name in NAMES]

    def exploitability(self, messages: Sequence[Message], script: Sequence[str], chances: Chances) -> float:
        """How many turns the best response to a policy wins above half of them: 0 for a Nash policy, exact.

        `messages` are the user's first turn, and `chances` the policy's probabilities of all `replies()` in each of
        some conversations up to a turn of the user. What they lack of 1 is malformed, and goes on malformed. The work
        is the number of replies to the power of the number of turns.
        """
        users, plays = (messages[-1].content, *script), self._plays(messages, script, chances)
        value: dict[int | None, float] = {}
        for turn in reversed(range(len(users))):
            before = [Reply(name, 0) for name in range(len(NAMES))] if turn else [None]
            rewards = {
                (own, action): self._against(plays[turn], own, action)
                for own, action in itertools.product(before, self.classes(users[turn]))
            }
            following, value = value, {}
            for (own, action), reward in rewards.items():
                name = own.name if own else None
                value[name] = max(value.get(name, 0.0), reward + following.get(action.name, 0.0))
        return value[None] - len(users) / 2

    def _against(self, played: Played, own: Reply | None, action: Reply) -> float:
        """The mean outcome of a reply, `own` being the one in the turn before."""
        return sum(
            chance * self.stage(action, reply, None if own is None else (own, before))
            for (before, reply), chance in played.items()
        )

    def _plays(self, messages: Sequence[Message], script: Sequence[str], chances: Chances) -> list[Played]:
        """What a policy plays in every turn."""
        replies, malformed = self.replies(), Reply(MALFORMED, 0)
        reached: list[tuple[tuple[Message, ...], Reply | None, float]] = [(tuple(messages), None, 1.0)]
        plays = []
        for user, following in itertools.zip_longest((messages[-1].content, *script), script):
            read = [self.read(user, reply) for reply in replies]
            played: Counter[tuple[Reply | None, Reply]] = Counter()
            going_on = []
            for (said, before, reach), shares in zip(reached, chances([said for said, _, _ in reached])):
                for reply, now, share in zip(replies, read, shares):
                    played[before, now] += reach * share
                    if following is not None:
                        after = (*said, Message("assistant", reply), Message("user", following))
                        going_on.append((after, now, reach * share))
            played[malformed, malformed] += 1 - sum(played.values())
            plays.append(played)
            reached = going_on
        return plays

    def classes(self, user: str) -> dict[Reply, list[str]]:
        """All well-formed replies to that turn of the user, by what counts of them: the actions of the exact game."""
        found: dict[Reply, list[str]] = {}
        for reply in self.replies():
            found.setdefault(self.read(user, reply), []).append(reply)
        return found


def generate(
    sizes: dict[str, int], seed: int, turns: int, preference: GamePreference, soft_labels: bool
) -> dict[str, list[Conversation]]:
    """Parts of the given numbers of conversations; none begins as another one does, within a part or across them.

    A conversation is a prompt with its script and a reply to be compared with, and a pair after every turn of the user:
    two replies of the behaviour policy, the better one drawn by the preference (or, with `soft_labels`, the preference
    itself as label). "test" and
    "val" are drawn first, so that they stay the same when the other sizes change. Raises ValueError.
    """
    _check(sizes, turns, preference)
    parts, seen = {}, set()
    for part in sorted(sizes, key=lambda name: ("test", "val", name).index(name)):
        rng = random.Random(f"{seed}-{part}")
        parts[part] = []
        for number in range(sizes[part]):
            users = [_unseen(rng, seen), *(_question(rng) for _ in range(turns - 1))]
            parts[part] += _conversations(rng, f"{part}-{number}", users, preference, soft_labels)
    return {part: parts[part] for part in sizes}


def _check(sizes: dict[str, int], turns: int, preference: GamePreference) -> None:
    room = NUMBERS * len(PHRASES) * len(THINGS) * (len(THINGS) - 1)
    if sum(sizes.values()) > room // 2:
        raise ValueError(
            f"the stand-in has {room // 2} conversations, asked for {sum(sizes.values())}: lower data.standin"
        )
    if not 0 <= preference.cyclic <= 1:
        raise ValueError(f"data.standin.cyclic={preference.cyclic} is a share: set it in [0, 1]")
    if turns < 1 or preference.things < 1:
        raise ValueError("data.standin.turns and data.standin.things count from 1")


def _conversations(
    rng: random.Random, id: str, users: list[str], preference: GamePreference, soft_labels: bool
) -> list[Conversation]:
    gold = _behaviour(rng, users[0], preference.things)
    found = [Conversation(id, (Message("user", users[0]),), script=tuple(users[1:]), gold=gold)]
    messages: tuple[Message, ...] = ()
    for turn, user in enumerate(users, start=1):
        messages = (*messages, Message("user", user))
        first, second = _two(rng, user, preference.things)
        (label,) = preference.stages(messages, first, second)
        if not soft_labels:
            first, second = (first, second) if rng.random() < label else (second, first)
            label = 1.0
        found.append(Conversation(f"{id}/{turn}", messages, (first, second), label))
        messages = (*messages, Message("assistant", rng.choice((first, second))))
    return found


def _two(rng: random.Random, user: str, things: int) -> tuple[str, str]:
    first = second = _behaviour(rng, user, things)
    while first == second:
        second = _behaviour(rng, user, things)
    return first, second


def _behaviour(rng: random.Random, user: str, things: int) -> str:
    """A name and a number of things, each uniform; a thing is mostly one of the two that the user named."""
    named = _asked(user)
    chosen = [rng.choice(named if rng.random() < NAMED else THINGS) for _ in range(rng.randint(1, things))]
    return " ".join([rng.choice(NAMES), *chosen])


def _unseen(rng: random.Random, seen: set[str]) -> str:
    while (question := _question(rng)) in seen:
        pass
    seen.add(question)
    return question


def _question(rng: random.Random) -> str:
    wanted, lost = rng.sample(THINGS, 2)
    return f"{rng.randrange(NUMBERS)}. {rng.choice(PHRASES).format(wanted=wanted, lost=lost)}"


def _asked(user: str) -> tuple[str, str]:
    """(the wanted thing, the lost one) of a turn of the user. Raises ValueError when it is none of the game's."""
    lost = re.search(r"(\w+) are lost", user)
    wanted = [thing for thing in re.findall(r"\w+", user) if thing in THINGS and lost and thing != lost[1]]
    if len(wanted) != 1:
        raise ValueError(f"{user!r} is no turn of the stand-in's game: compare replies to its own prompts only")
    return wanted[0], lost[1]
