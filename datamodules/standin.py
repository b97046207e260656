"""A generator of small word problems in GSM8K's exact format, for when no data is at hand. Never a silent one.

A problem is a start value and two to four operations on it, told about two people and one kind of thing. Worked
solutions to imitate can carry a habit to unlearn: with chance `misconception` a "times" step is worked as an addition.
"""

import operator
import random
from dataclasses import dataclass

from datamodules.problems import Problem

VERSION = 1  # part of every fingerprint: raise it when the text for a seed changes
NAMES = ("Tom", "Ana", "Ben", "Mia", "Leo", "Zoe", "Sam", "Eva")
ITEMS = ("apples", "books", "coins", "pens", "cards", "stamps")
MAX_VALUE, MAX_STEP = 40, 12

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
PHRASES = {
    "+": ("{b} gives {a} {k} more.", "{a} buys {k} {item}.", "{a} finds {k} others."),
    "-": ("{a} loses {k}.", "{a} sells {k} {item}.", "{a} gives {k} to {b}."),
    "*": ("Now {a} has {k} times as many.", "{b} makes it {k} times more."),
    "/": ("{a} keeps half.", "Half of them get lost."),
}


@dataclass(frozen=True)
class Step:
    """One thing that happens, the true number after it, and the number a solution arrives at."""

    op: str
    operand: int
    phrase: str
    true: int
    worked: int


@dataclass(frozen=True)
class Story:
    """Who has how many of what at first, and what happens to them."""

    a: str
    b: str
    item: str
    start: int
    steps: tuple[Step, ...]

    def question(self) -> str:
        told = [step.phrase.format(a=self.a, b=self.b, item=self.item, k=step.operand) for step in self.steps]
        return " ".join([f"{self.a} has {self.start} {self.item}.", *told, f"How many {self.item} does {self.a} have?"])

    def solution(self, boxed: bool) -> str:
        lines, before = [], self.start
        for step in self.steps:
            calculation = f"{before}{step.op}{step.operand}"
            lines.append(f"{self.a} has {calculation} = <<{calculation}={step.worked}>>{step.worked} {self.item}.")
            before = step.worked
        return "\n".join([*lines, f"The answer is $\\boxed{{{before}}}$." if boxed else f"#### {before}"])


def generate(
    count: int, seed: int | str, misconception: float = 0.0, slip: float = 0.0, boxed: bool = False
) -> list[Problem]:
    """`count` problems, the same for the same arguments; questions may repeat (about 7 in 5,000).

    `misconception` is the chance that a "times" step is worked as an addition, `slip` the chance that one step of a
    solution is off by 1 or 2; the error propagates, and `gold` stays the true answer. `boxed` ends solutions as MATH's.
    """
    _check_chances(misconception, slip)
    rng = random.Random(seed)
    stories = (_story(rng, misconception, slip) for _ in range(count))
    return [_problem(f"standin-{index}", story, boxed) for index, story in enumerate(stories)]


def split(
    sizes: dict[str, int], seed: int, misconception: float = 0.0, slip: float = 0.0, boxed: bool = False
) -> dict[str, list[Problem]]:
    """Parts of the given sizes in which no question occurs twice, within a part or across them.

    Only the part named "sft" has `misconception` and `slip`. "test" and "val" are drawn first, so that they stay the
    same when the other sizes change.
    """
    _check_chances(misconception, slip)
    parts, seen = {}, set()
    for part in sorted(sizes, key=lambda name: ("test", "val", name).index(name)):
        habits = (misconception, slip) if part == "sft" else (0.0, 0.0)
        rng = random.Random(f"{seed}-{part}")
        parts[part] = [_problem(f"{part}-{i}", _unseen(rng, *habits, seen), boxed) for i in range(sizes[part])]
    return {part: parts[part] for part in sizes}


def _check_chances(misconception: float, slip: float) -> None:
    for key, chance in (("misconception", misconception), ("slip", slip)):
        if not 0 <= chance <= 1:
            raise ValueError(f"{key} is a probability, got {chance}: set data.standin.{key} in [0, 1]")


def _problem(id: str, story: Story, boxed: bool) -> Problem:
    return Problem(id, story.question(), story.solution(boxed), str(story.steps[-1].true))


def _unseen(rng: random.Random, misconception: float, slip: float, seen: set[str]) -> Story:
    """A story whose question is new; it is added to `seen`."""
    for _ in range(1_000):
        story = _story(rng, misconception, slip)
        if (question := story.question()) not in seen:
            seen.add(question)
            return story
    raise ValueError(f"the stand-in has no more new questions after {len(seen)}: ask for fewer rows in data.standin")


def _story(rng: random.Random, misconception: float, slip: float) -> Story:
    a, b = rng.sample(NAMES, 2)
    item, start = rng.choice(ITEMS), rng.randint(2, 12)
    length = rng.choices((2, 3, 4), weights=(2, 2, 1))[0]
    slipped = rng.randrange(length) if rng.random() < slip else None
    true, worked, steps = start, start, []
    for index in range(length):
        op, k = _operation(rng, min(true, worked), max(true, worked), halves=true % 2 == worked % 2 == 0)
        true = OPERATIONS[op](true, k)
        worked = OPERATIONS["+" if op == "*" and rng.random() < misconception else op](worked, k)
        worked = _off_by_little(rng, worked) if index == slipped else worked
        steps.append(Step(op, k, rng.choice(PHRASES[op]), true, worked))
    return Story(a, b, item, start, tuple(steps))


def _operation(rng: random.Random, low: int, high: int, halves: bool) -> tuple[str, int]:
    """An operation that keeps the true and the worked number, of which these are the extremes, whole and in 1..40."""
    choices = {}
    if high < MAX_VALUE:
        choices["+"] = range(1, min(MAX_STEP, MAX_VALUE - high) + 1)
    if low >= 3:
        choices["-"] = range(1, min(MAX_STEP, low - 1) + 1)
    if 2 * high <= MAX_VALUE:
        choices["*"] = (2, 3) if 3 * high <= MAX_VALUE else (2,)
    if halves:
        choices["/"] = (2,)
    op = rng.choice(list(choices))
    return op, rng.choice(choices[op])


def _off_by_little(rng: random.Random, value: int) -> int:
    return rng.choice([near for near in (value - 2, value - 1, value + 1, value + 2) if 1 <= near <= MAX_VALUE])
