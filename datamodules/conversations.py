"""Conversations with replies to compare, from the rows in which they are published.

The layout of a row is told from its fields: MT-Bench questions, MT-Bench-101 dialogues, HH transcripts (arXiv
2204.05862), UltraFeedback-binarized and SPPO rows, GPM's (`reject`), LLaMA-Factory's (`conversations`), plain
{prompt, chosen, rejected} with RewardBench's `subset`, human judgements of two responses, and `messages`.
"""

import itertools
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from datamodules.batches import Message
from datamodules.jsonl import field

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "Human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "Assistant"), "assistant"),
    "system": "system",
}
ID_FIELDS = ("id", "prompt_id", "question_id", "idx")
TURN = re.compile(r"\n\n(Human|Assistant):")
VERDICTS = {"model_1": 1.0, "tie": 0.5, "model_2": 0.0}


@dataclass(frozen=True)
class Conversation:
    """What was said up to a turn of the user, and up to two replies to it.

    Without a reply it is a prompt, and `script` is what the user says next, whatever is answered. One reply is a
    reference. Of two, the first is better with probability `label`; `value` is as in `Pair`. `gold` is a reference
    that is not there to be imitated. `subset` is the part of a benchmark.
    """

    id: str
    messages: tuple[Message, ...]
    replies: tuple[str, ...] = ()
    label: float = 1.0
    value: tuple[float, float] | None = None
    script: tuple[str, ...] = ()
    gold: str = ""
    subset: str = ""

    @property
    def opening(self) -> str:
        """The user's first turn: conversations that share it belong to the same part of a data set."""
        return next(message.content for message in self.messages if message.role == "user")


class Place(NamedTuple):
    """Where a row stands, as errors say it."""

    path: str
    line: int
    id: str = ""

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}" + (f" ({reprlib.repr(self.id)})" if self.id else "")


class Defect(ValueError):
    """A row that cannot be used: one sentence, and the `reason` under which such rows are counted."""

    def __init__(self, where: Place | str, reason: str, remedy: str) -> None:
        super().__init__(f"{where}: {reason}: {remedy}, or leave such rows out with data.on_error=skip")
        self.reason = reason


class Ledger:
    """Rows that are left out, counted by reason; with `on_error="stop"` a defect is raised instead."""

    def __init__(self, on_error: str) -> None:
        if on_error not in ("stop", "skip"):
            raise ValueError(f"data.on_error={on_error!r}: there are stop, skip")
        self.stops, self.counts = on_error == "stop", Counter()

    def note(self, error: ValueError, reason: str = "the row cannot be read") -> None:
        """Count a defect under its own reason, or else under `reason`; or raise it."""
        if self.stops:
            raise error
        self.counts[getattr(error, "reason", reason)] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in sorted(self.counts.items()))


# ---- one row


def conversations(record: dict, default_id: str, where: Place) -> list[Conversation]:
    """The conversations of a row: one, or for a dialogue the prompt with its script and the last turn with its reply.

    Raises `Defect` or another ValueError with one sentence that names file, line and field.
    """
    read = next((read for keys, read in LAYOUTS if keys <= record.keys()), None)
    if read is None:
        layouts = "; ".join(", ".join(sorted(keys)) for keys, _ in LAYOUTS)
        raise Defect(
            where, f"no known layout has the fields {reprlib.repr(list(record))}", f"rename them to one of: {layouts}"
        )
    id = _named(record, default_id, where)
    where = where._replace(id=id)
    found = read(record, id, where)
    return [_compared(each, where) if len(each.replies) == 2 else each for each in found]


def _questions(record: dict, id: str, where: Place) -> list[Conversation]:
    """MT-Bench: every turn of the user is given beforehand; a reference is the judge's, not to be imitated."""
    turns = _texts(record, "turns", where)
    gold = (record.get("reference") or [""])[0]
    if not isinstance(gold, str):
        raise Defect(where, "a reference is not text", "write it as text")
    return [Conversation(id, (Message("user", turns[0]),), script=tuple(turns[1:]), gold=gold)]


def _dialogue(record: dict, id: str, where: Place) -> list[Conversation]:
    """MT-Bench-101: the user's turns as a script, and the dialogue up to its last reply, which is a reference."""
    turns = field(record, "history", list, *where[:2])
    said = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"user", "bot"} <= turn.keys():
            raise Defect(where, "a turn of `history` lacks `user` or `bot`", "give each turn both")
        said += [Message("user", _turn(turn["user"], where)), Message("assistant", _reply(turn["bot"], where))]
    task = str(record.get("task", ""))
    users = [message.content for message in said[::2]]
    scripted = Conversation(id, (said[0],), script=tuple(users[1:]), subset=task)
    return [scripted, Conversation(id, tuple(said[:-1]), (said[-1].content,), subset=task)]


def _judged_twice(record: dict, id: str, where: Place) -> list[Conversation]:
    """Two models' answers to MT-Bench questions, the first turns compared in both orders, which are averaged."""
    verdicts = [record[f"verdict_order_{order}"] for order in ("12", "21")]
    if any(verdict not in tuple(VERDICTS) for verdict in verdicts):
        raise Defect(where, f"a verdict is not one of {', '.join(VERDICTS)}", "judge the pair again")
    question = _texts(record, "turns", where)[0]
    replies = tuple(_texts(record, f"answer_{member}_turns", where)[0] for member in (1, 2))
    label = sum(VERDICTS[verdict] for verdict in verdicts) / 2
    return [Conversation(id, (Message("user", question),), replies, label)]


def _annotated(record: dict, id: str, where: Place) -> list[Conversation]:
    """PandaLM: the majority of three people, who say 1, 2 or 0 for a tie; without a majority it is a tie."""
    votes = [record.get(f"annotator_{person}") for person in (1, 2, 3)]
    if any(vote not in (0, 1, 2) for vote in votes):
        raise Defect(where, f"the annotators say {votes}", "0, 1 and 2 are votes")
    vote, count = Counter(votes).most_common(1)[0]
    instruction, given = _turn(record["instruction"], where), record.get("input")
    prompt = f"{instruction}\n\n{_turn(given, where)}" if given else instruction
    replies = (_reply(record["response_1"], where), _reply(record["response_2"], where))
    return [Conversation(id, (Message("user", prompt),), replies, {1: 1.0, 2: 0.0}.get(vote if count > 1 else 0, 0.5))]


def _labelled(record: dict, id: str, where: Place) -> list[Conversation]:
    """LLMBar and pairs of MT-Bench: `label` 1 or 2 is the better response, 0 a tie."""
    if record["label"] not in (0, 1, 2):
        raise Defect(where, f"field `label` is {reprlib.repr(record['label'])}", "1 or 2 is the better, 0 a tie")
    replies = (_reply(record["response_1"], where), _reply(record["response_2"], where))
    messages = (Message("user", _turn(record["prompt"], where)),)
    label = {1: 1.0, 2: 0.0, 0: 0.5}[record["label"]]
    return [Conversation(id, messages, replies, label, subset=str(record.get("subset", "")))]


def _sharegpt(record: dict, id: str, where: Place) -> list[Conversation]:
    """LLaMA-Factory: turns are {from, value}, the two replies as well."""
    messages = _messages(field(record, "conversations", list, *where[:2]), where)
    replies = [_messages([record[key]], where) for key in ("chosen", "rejected")]
    if any([message.role for message in reply] != ["assistant"] for reply in replies):
        raise Defect(where, "a reply is not the assistant's", "give it the role of the assistant")
    return [_pair(id, messages, [reply[0].content for reply in replies], record, where)]


def _instruction(record: dict, id: str, where: Place) -> list[Conversation]:
    """The rows of the General Preference Model, which spell it `reject`."""
    return _chosen_rejected({**record, "prompt": record["instruction"], "rejected": record["reject"]}, id, where)


def _chosen_rejected(record: dict, id: str, where: Place) -> list[Conversation]:
    """Texts, HH transcripts or lists of messages; what precedes the last reply must be the same in both."""
    prompt = record.get("prompt")
    given = _messages(prompt, where) if isinstance(prompt, list) else ()
    members = [_member(record[key], given, prompt, where) for key in ("chosen", "rejected")]
    if members[0][0] != members[1][0]:
        raise Defect(where, "the two members differ before the last reply", "give both the same turns")
    return [_pair(id, members[0][0], [reply for _, reply in members], record, where)]


def _member(value: Any, given: tuple[Message, ...], prompt: Any, where: Place) -> tuple[tuple[Message, ...], str]:
    """What was said before, and the reply, of `chosen` or of `rejected`."""
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        messages = _transcript(value, where)
    elif isinstance(value, str):
        return given or (Message("user", _turn(prompt, where)),), _reply(value, where)
    elif isinstance(value, list):
        messages = _messages(value, where)
    else:
        raise Defect(where, "a response is not text", "write it as text")
    if not messages or messages[-1].role != "assistant":
        raise Defect(where, "a reply is not the assistant's", "end both members with the assistant's turn")
    # hub rows repeat the prompt in both members, or give it once
    before = messages[:-1] if len(messages) > 1 else given
    if not before:
        raise Defect(where, "there is no turn of the user", "give the row a prompt")
    return before, messages[-1].content


def _one_reply(record: dict, id: str, where: Place) -> list[Conversation]:
    """Messages that end with the assistant's reply, or with the user's turn; KTO's `label` false is a bad reply."""
    messages = _messages(field(record, "messages", list, *where[:2]), where)
    if record.get("label") is False:
        raise Defect(where, "the reply is labelled false and has no other beside it", "pair it with a better one")
    if messages and messages[-1].role == "assistant":
        return [Conversation(id, _ordered(messages[:-1], where), (messages[-1].content,))]
    return [Conversation(id, _ordered(messages, where))]


def _prompt(record: dict, id: str, where: Place) -> list[Conversation]:
    if half := record.keys() & {"chosen", "rejected", "reject", "response_1", "response_2"}:
        raise Defect(where, f"a pair has only its {' and '.join(sorted(half))}", "give it both responses and a label")
    prompt = record["prompt"]
    if isinstance(prompt, list):
        return [Conversation(id, _ordered(_messages(prompt, where), where))]
    return [Conversation(id, (Message("user", _turn(record["prompt"], where)),))]


LAYOUTS: tuple[tuple[set[str], Callable[[dict, str, Place], list[Conversation]]], ...] = (
    ({"verdict_order_12", "verdict_order_21", "turns", "answer_1_turns", "answer_2_turns"}, _judged_twice),
    ({"instruction", "response_1", "response_2", "annotator_1"}, _annotated),
    ({"prompt", "response_1", "response_2", "label"}, _labelled),
    ({"turns"}, _questions),
    ({"history"}, _dialogue),
    ({"conversations", "chosen", "rejected"}, _sharegpt),
    ({"instruction", "chosen", "reject"}, _instruction),
    ({"chosen", "rejected"}, _chosen_rejected),
    ({"messages"}, _one_reply),
    ({"prompt"}, _prompt),
)


# ---- parts of a row


def _named(record: dict, default: str, where: Place) -> str:
    key = next((key for key in ID_FIELDS if record.get(key) is not None), None)
    return default if key is None else str(field(record, key, int if isinstance(record[key], int) else str, *where[:2]))


def _pair(id: str, messages: tuple[Message, ...], replies: Sequence[str], record: dict, where: Place) -> Conversation:
    """A pair whose first reply was chosen; SPPO's rows and GPM's say with what probability it is the better one."""
    label = _probability(record, "chosen_probs" if "chosen_probs" in record else "label", where)
    value = None
    if {"chosen_probs_win", "chosen_probs_lose"} <= record.keys():
        value = tuple(_probability(record, f"chosen_probs_{member}", where) for member in ("win", "lose"))
    subset = str(record.get("subset") or "")
    return Conversation(id, _ordered(messages, where), tuple(replies), label, value, subset=subset)


def _probability(record: dict, key: str, where: Place) -> float:
    if record.get(key) is None:
        return 1.0
    value = float(record[key]) if isinstance(record[key], bool) else field(record, key, float, *where[:2])
    if not 0 <= value <= 1:
        raise Defect(where, f"field `{key}` is {value:g}, no probability", "write a number in [0, 1]")
    return value


def _texts(record: dict, key: str, where: Place) -> list[str]:
    return [_turn(text, where) for text in field(record, key, list, *where[:2])]


def _turn(text: Any, where: Place) -> str:
    return _said(text, "turn", where)


def _reply(text: Any, where: Place) -> str:
    return _said(text, "response", where)


def _said(text: Any, what: str, where: Place) -> str:
    if not isinstance(text, str):
        raise Defect(where, f"a {what} is not text", "write it as text")
    if not text.strip():
        raise Defect(where, f"a {what} is empty", "fill it in")
    return text


def _messages(turns: Sequence[Any], where: Place) -> tuple[Message, ...]:
    """Turns as {role, content} or {from, value}; a system turn that says nothing is none."""
    return tuple(m for m in (_message(turn, where) for turn in turns) if m.content)


def _message(turn: Any, where: Place) -> Message:
    if not isinstance(turn, dict) or not ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()):
        raise Defect(where, "a turn has neither `role` and `content` nor `from` and `value`", "give it both fields")
    role, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
    if not isinstance(role, str) or role not in ROLES:
        raise Defect(where, f"the role {reprlib.repr(role)} is unknown", f"roles are {', '.join(ROLES)}")
    if ROLES[role] == "system" and content == "":
        return Message("system", "")
    return Message(ROLES[role], _said(content, "response" if ROLES[role] == "assistant" else "turn", where))


def _transcript(text: str, where: Place) -> tuple[Message, ...]:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...`, as published with HH."""
    parts = TURN.split(text)[1:]
    return _messages([{"role": role, "content": said.strip()} for role, said in zip(parts[::2], parts[1::2])], where)


def _ordered(messages: tuple[Message, ...], where: Place) -> tuple[Message, ...]:
    """The turns before a reply: an optional system turn, then user and assistant in turn, the user first and last."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise Defect(where, "there is no turn of the user", "give the row a prompt")
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise Defect(
            where, f"the roles are out of order ({reprlib.repr(' '.join(roles))})", "user and assistant alternate"
        )
    if turns[-1] != "user":
        raise Defect(where, "the turn before the reply is not the user's", "add the missing turn")
    return messages


def _compared(conversation: Conversation, where: Place) -> Conversation:
    first, second = (_reply(reply, where) for reply in conversation.replies)
    if first.strip() == second.strip():
        raise Defect(where, "the two responses are the same", "delete the row")
    return replace(conversation, replies=(first, second))


# ---- several rows


def read_conversations(
    rows: Iterable[tuple[int, dict]], path: str, split: str, ledger: Ledger, seen: set[str]
) -> list[Conversation]:
    """The conversations of (line, record) rows; ids are the rows' own where they have some, else `<split>-<row>`.

    An id that is among `seen`, to which all are added, gets a number behind it.
    """
    found = []
    for line, record in rows:
        try:
            made = conversations(record, f"{split}-{line - 1}", Place(path, line))
        except ValueError as error:
            ledger.note(error)
            continue
        if made[0].id in seen:
            made = [replace(each, id=f"{each.id}#{len(seen)}") for each in made]
        seen.add(made[0].id)
        found += made
    return found


def continued(replies: Sequence[str], script: Sequence[str]) -> str:
    """Replies and the user's turns between them as the text that `turns_of` reads, in the form of HH transcripts."""
    later = (f"\n\nHuman: {user}\n\nAssistant: {reply}" for user, reply in zip(script, replies[1:], strict=True))
    return "".join(itertools.chain(replies[:1], later))


def turns_of(text: str) -> tuple[list[str], list[str]]:
    """(replies, user turns between them) of a continued conversation; a single reply is one."""
    parts = TURN.split(text)
    replies, users = [parts[0]], []
    for role, said in zip(parts[1::2], parts[2::2]):
        (users if role == "Human" else replies).append(said.strip())
    return replies, users
