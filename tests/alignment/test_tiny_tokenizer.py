"""The tokenizer of the stand-in grammar: lossless on any text, fixed ids, nothing added."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer, vocabulary

TOKENIZER = tiny_tokenizer()
GSM8K = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "gsm8k"
ROW = "Tom has 5 apples. Ana gives Tom 12 more.\nTom has 5+12 = <<5+12=17>>17 apples.\n#### 17"


@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.sampled_from(["<eos>", "<pad>", "<0x41>", " ", "7", " 42", "007", "\\boxed{", "####", "é", "\n\n"])))
def test_text_that_looks_like_tokens_comes_back_and_never_ends_a_response(pieces):
    ids = TOKENIZER.encode("".join(pieces))
    assert TOKENIZER.decode(ids) == "".join(pieces)
    assert not {TOKENIZER.eos_token_id, TOKENIZER.pad_token_id} & set(ids)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_row_comes_back(split):
    for line in (GSM8K / f"{split}.jsonl").read_bytes().split(b"\n")[:-1]:
        for text in json.loads(line).values():
            assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_the_grammar_costs_one_token_a_piece():
    pieces = [TOKENIZER.decode([token]) for token in TOKENIZER.encode(ROW)]
    assert pieces[:5] == ["Tom", " has", " 5", " apples", "."]
    assert pieces[-14:] == [" ", "<<", "5", "+", "12", "=", "17", ">>", "17", " apples", ".", "\n", "####", " 17"]


def test_ids_are_fixed_and_nothing_is_added():
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, len(TOKENIZER)) == (0, 1, len(vocabulary()))
    assert TOKENIZER.encode("A") == [2 + ord("A")]
    assert TOKENIZER.encode("") == []


def test_it_survives_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (ROW, "<eos> é\u2028<0x41>  120"):
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
