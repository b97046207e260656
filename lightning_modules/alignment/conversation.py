"""Going on with conversations: a policy's own replies, and between them what the user says next whatever they are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from datamodules.batches import Message, Prompt

# what is replied to each prompt, and whether the length limit left the reply whole
Reply = Callable[[list[Prompt]], list[tuple[str, bool]]]


@dataclass(frozen=True)
class Line:
    """A conversation from a state on: the replies so far, and the prompt of the last of them.

    `ended` says that no reply was cut off by the length limit. `sample` is the number of the last reply among those to
    its prompt.
    """

    start: Prompt
    asked: Prompt
    replies: tuple[str, ...]
    ended: bool
    sample: int

    @property
    def text(self) -> str:
        """Replies and the user's turns between them, as the oracles of conversations read them."""
        later = (f"\n\nHuman: {user}\n\nAssistant: {said}" for user, said in zip(self.start.script, self.replies[1:]))
        return "".join([self.replies[0], *later])


def begun(prompt: Prompt, sample: int, reply: str, ended: bool) -> Line:
    """The conversation of one reply."""
    return Line(prompt, prompt, (reply,), ended, sample)


def to_the_end(lines: list[Line], data: Any, reply: Reply) -> list[Line]:
    """The lines with a reply to everything that the user still says, in their order.

    A line ends where a reply is cut off, or where the next prompt would be longer than `data.max_prompt`, which cuts it
    off as well: what the length limit stops loses, whatever would follow.
    """
    made = list(lines)
    while open_ := [i for i, line in enumerate(made) if line.ended and line.asked.script]:
        following = {i: after(made[i].asked, made[i].replies[-1], f"/{made[i].sample}", data) for i in open_}
        fitting = {i: prompt for i, prompt in following.items() if len(prompt.ids) <= data.max_prompt}
        said = dict(zip(fitting, reply(list(fitting.values())))) if fitting else {}
        for i in open_:
            if i not in said:
                made[i] = replace(made[i], ended=False)
                continue
            text, ended = said[i]
            made[i] = replace(made[i], asked=fitting[i], replies=(*made[i].replies, text), ended=ended, sample=0)
    return made


def after(prompt: Prompt, reply: str, branch: str, data: Any) -> Prompt:
    """The prompt of the next turn: the reply, and what the user says whatever it was."""
    messages = (*prompt.messages, Message("assistant", reply), Message("user", prompt.script[0]))
    ids = data.encode_messages(messages)
    return Prompt(f"{prompt.id}{branch}>", prompt.script[0], prompt.gold, ids, messages, prompt.script[1:])
