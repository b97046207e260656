"""Conversations as tokens, through a chat template that is applied exactly once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from datamodules.batches import Message

# few tokens for any tokenizer, and for that of the tiny policy one a word
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}Question\n{{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Answer\n{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer\n{% endif %}"
)


class ChatTemplate:
    """The tokens of a conversation up to the reply, and those of the reply with the token that ends its turn.

    `template` is None for the tokenizer's own, `plain`, or a file with a Jinja template. `stop_ids` are the tokens at
    which the policy stops. The template writes the special tokens, so that none is added beside it. Raises ValueError
    for a tokenizer without a template and FileNotFoundError for a missing file.
    """

    def __init__(self, tokenizer: Any, template: str | None, stop_ids: Sequence[int]) -> None:
        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids)
        self.template = PLAIN if template == "plain" else _own(tokenizer) if template is None else _read(template)
        self.reserved = sorted(set(tokenizer.all_special_tokens))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the assistant's reply begins. Raises ValueError when they would begin with two BOS."""
        return self._prompt(self._render(messages, ask=True))

    def encode(self, messages: Sequence[Message], replies: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """The prompt's tokens, and for each reply those that follow them when the assistant says it, its end last."""
        before = self._render(messages, ask=True)
        prompt = self._prompt(before)
        wholes = [self._render([*messages, Message("assistant", text)], ask=False) for text in replies]
        return prompt, [self._reply(before, prompt, whole) for whole in wholes]

    def _prompt(self, text: str) -> list[int]:
        ids = self._tokens(text)
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise ValueError("the chat template writes the beginning-of-sequence token twice: set data.template=plain")
        return ids

    def _reply(self, before: str, prompt: list[int], whole: str) -> list[int]:
        if not whole.startswith(before):
            raise ValueError(
                "the chat template does not continue its own prompt with the reply (it rewrites what came before): set "
                "data.template=plain, or a file with a template that does"
            )
        # tokenised together where that leaves the prompt as it is, which sampling has seen
        both = self._tokens(whole)
        ids = both[len(prompt) :] if both[: len(prompt)] == prompt else self._tokens(whole[len(before) :])
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]

    def refused(self, texts: Sequence[str]) -> str | None:
        """A token of the tokenizer's own that a text spells out: it would end the turn, or begin another one."""
        return next((token for token in self.reserved for text in texts if token in text), None)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=ask
            )
        except jinja2.TemplateError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the chat template refuses a conversation ({reason}): set data.template=plain") from error


def _own(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the policy's tokenizer has no chat template: set data.template=plain, or a file with a Jinja template"
        )
    return tokenizer.get_chat_template()


def _read(template: str) -> str:
    path = Path(template)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.template={template}: there are null (the tokenizer's own), plain, and files with a Jinja template"
        )
    return path.read_text(encoding="utf-8")
