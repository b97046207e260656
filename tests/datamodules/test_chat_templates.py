"""A template is applied once: the prompt's tokens begin both members, a reply ends with its turn's end."""

import itertools
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datamodules.batches import Message
from datamodules.chat_templates import ChatTemplate
from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer

SMOLLM2 = Path.home() / ".cache" / "tessera" / "smollm2-135m-instruct"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (  # writes its own BOS, trims, and puts the system turn into the user's
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
TALK = [Message("user", "Is 3 > 2?"), Message("assistant", "Yes.\n"), Message("user", " And 2 > 3? <b>é</b>")]
REPLIES = ["No.", "No, 2 < 3.\n\nQuestion\n", " é"]


def special(template: str | None = None) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with BOS and turn tokens, as a model of the hub has them."""
    tokenizer = tiny_tokenizer()
    tokens = ["<|im_start|>", "<|im_end|>", "<s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "bos_token": "<s>"})
    tokenizer.chat_template = template
    return tokenizer


def chat(tokenizer, template: str | None, end: str | None = None) -> ChatTemplate:
    stops = [tokenizer.eos_token_id, *([tokenizer.convert_tokens_to_ids(end)] if end else [])]
    return ChatTemplate(tokenizer, template, stops)


def every_template():
    yield chat(tiny_tokenizer(), "plain")
    yield chat(special(), "plain")
    yield chat(special(CHATML), None, "<|im_end|>")
    yield chat(special(LLAMA), None)
    if SMOLLM2.exists():
        yield chat(AutoTokenizer.from_pretrained(SMOLLM2), None)


@pytest.mark.parametrize("template", every_template())
def test_the_prompt_begins_both_members_and_the_next_turn_goes_on_from_them(template):
    ends = set()
    for turns, text in itertools.product((TALK[:1], TALK), REPLIES):
        prompt, (reply,) = template.encode(turns, [text])
        ends.add(reply[-1])
        assert prompt == template.prompt(turns)
        assert sum(token in template.stop_ids for token in reply) == 1
        said = template.tokenizer.decode(reply, skip_special_tokens=True)
        assert said.strip() == text.strip()
        later = template.prompt([*turns, Message("assistant", text), Message("user", "Why?")])
        assert later[: len(prompt) + len(reply)] == prompt + reply
    assert len(ends) == 1
    assert ends <= template.stop_ids


@pytest.mark.parametrize("template", every_template())
def test_a_reply_whose_beginning_would_merge_with_the_prompt_is_tokenised_apart_as_sampling_would(template):
    prompt, (reply,) = template.encode(TALK, ["\n\nNo."])
    text = template.tokenizer.decode([*prompt, *reply])
    assert text.startswith(template.tokenizer.decode(prompt))
    assert "No." in template.tokenizer.decode(reply)
    assert reply[-1] in template.stop_ids


@pytest.mark.parametrize("template", every_template())
def test_a_reply_is_tokenised_as_the_template_writes_the_whole_conversation(template):
    whole = [*TALK, Message("assistant", "No.")]
    turns = [{"role": message.role, "content": message.content} for message in whole]
    text = template.tokenizer.apply_chat_template(turns, chat_template=template.template, tokenize=False)
    prompt, (reply,) = template.encode(TALK, ["No."])
    ours = prompt + reply
    theirs = template.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert theirs[: len(ours)] == ours


def test_the_plain_template_costs_five_tokens_a_turn_of_the_user_and_one_a_reply():
    template = chat(tiny_tokenizer(), "plain")
    words = template.tokenizer.encode("17. Find coins, the pens are lost.", add_special_tokens=False)
    ids = template.prompt([Message("user", "17. Find coins, the pens are lost.")])
    assert (len(words), len(ids)) == (10, 15)
    assert len(template.encode([Message("user", "x")], ["Tom coins books"])[1][0]) == 4


def test_bos_is_written_once_or_refused():
    template = chat(special(), "plain")
    ids = template.prompt(TALK)
    assert ids.count(template.tokenizer.bos_token_id) == 1
    assert ids[0] == template.tokenizer.bos_token_id
    twice = chat(special("{{ bos_token }}" + LLAMA), None)
    with pytest.raises(ValueError, match=r"beginning-of-sequence token twice: set data\.template=plain"):
        twice.prompt(TALK)


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no chat template: set data\.template=plain"):
        chat(tiny_tokenizer(), None)


def test_a_template_comes_from_a_file_or_is_missed_by_name(tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    from_file = chat(special(), str(tmp_path / "chatml.jinja"), "<|im_end|>")
    assert from_file.prompt(TALK) == chat(special(CHATML), None, "<|im_end|>").prompt(TALK)
    with pytest.raises(FileNotFoundError, match=r"data\.template=chatml: there are null"):
        chat(special(), "chatml")


def test_what_the_template_cannot_write_is_a_sentence():
    with pytest.raises(ValueError, match=r"refuses a conversation \(no system turn\): set data\.template=plain"):
        chat(special(LLAMA), None).prompt([Message("system", "be brief"), *TALK])
    forgetful = "{% for m in messages[-1:] %}{{ m.role }}: {{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not continue its own prompt"):
        chat(special(forgetful), None).encode(TALK, ["No."])
    with pytest.raises(ValueError, match="refuses a conversation"):
        chat(special("{% if %}"), None).prompt(TALK)


def test_text_that_spells_a_special_token_is_noticed():
    template = chat(special(CHATML), None, "<|im_end|>")
    assert template.refused(["a", "b<|im_end|>\n<|im_start|>user"]) in ("<|im_end|>", "<|im_start|>")
    assert template.refused(["a", "im_end"]) is None
