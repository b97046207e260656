"""Text is read whole from every kind of file, split between documents, and refused in a sentence when it is broken."""

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from datamodules import text_sources
from datamodules.shards import Stream, write_llmc, write_nanogpt
from datamodules.text_sources import find_text, held_out, locate, pieces, read_text, texts, tokenised
from datamodules.tokenizers import make_tokenizer

REAL = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "text"
real = pytest.mark.skipif(not (REAL / "tiny_shakespeare.txt").exists(), reason=f"no real data in {REAL}")
ROWS = [f"Document {n}.\nIt has {n} words or so.\n" for n in range(40)]
NO_HUB = {"name": None, "config": None, "tokens": 100, "download": False}


@pytest.fixture
def find(tmp_path):
    def find(path, tokenizer="bytes", **changes):
        settings = {"hub": NO_HUB, "column": "text", "val_fraction": 0.1, "cache": tmp_path / "cache"} | changes
        return find_text(path, lambda: make_tokenizer(tokenizer), **settings)

    return find


def write_rows(path: Path, rows=ROWS, column="text") -> Path:
    content = "".join(json.dumps({column: row}) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def text_of(stream: Stream) -> str:
    return stream.read(0, len(stream)).astype(np.uint8).tobytes().decode()


# ---- files of text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_documents_are_split_between_documents(tmp_path, find, name):
    source = find(write_rows(tmp_path / name))
    assert text_of(source.parts["train"]) == "".join(f"{row}\n" for row in ROWS[:36])
    assert text_of(source.parts["val"]) == "".join(f"{row}\n" for row in ROWS[36:])
    assert (source.name, source.standin, source.origin) == ("a", False, f"data.path={tmp_path / name}")


def test_gpt2_puts_its_end_token_after_every_document(tmp_path, find):
    source = find(write_rows(tmp_path / "a.jsonl"), "gpt2")
    tokens = source.parts["val"].read(0, len(source.parts["val"]))
    assert tokens[-1] == 50_256
    assert (tokens == 50_256).sum() == 4
    assert make_tokenizer("gpt2").decode(tokens.tolist()) == "".join(f"{row}<|endoftext|>" for row in ROWS[36:])


def test_a_plain_text_is_split_by_position_and_gets_nothing_added(tmp_path, find):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    source = find(tmp_path / "a.txt")
    assert text_of(source.parts["train"]) + text_of(source.parts["val"]) == "0123456789" * 10
    assert len(source.parts["val"]) == 10


def test_a_folder_gives_its_parts(tmp_path, find):
    for part, text in {"train": "t" * 50, "valid": "v" * 20, "test": "e" * 30}.items():
        (tmp_path / f"{part}.txt").write_text(text)
    (tmp_path / "README.md").write_text("about")
    source = find(tmp_path)
    assert {part: text_of(stream) for part, stream in source.parts.items()} == {
        "train": "t" * 50, "val": "v" * 20, "test": "e" * 30,
    }  # fmt: skip


def test_a_folder_without_train_learns_from_val_and_says_so(tmp_path, find, caplog):
    (tmp_path / "valid.txt").write_text("v" * 100)
    (tmp_path / "test.txt").write_text("e" * 30)
    parts = {part: len(stream) for part, stream in find(tmp_path).parts.items()}
    assert parts == {"train": 90, "val": 10, "test": 30}
    assert "no train part: valid.txt is trained on" in caplog.text


def test_a_pattern_takes_several_files_in_order(tmp_path, find):
    write_rows(tmp_path / "b.jsonl", ROWS[20:])
    write_rows(tmp_path / "a.jsonl", ROWS[:20])
    source = find(tmp_path / "*.jsonl")
    assert text_of(source.parts["train"]) == "".join(f"{row}\n" for row in ROWS[:36])
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(ValueError, match=r"files of several kinds \(\.jsonl, \.txt\)"):
        find(tmp_path / "*")


def test_the_hubs_numbered_parquet_files_are_a_part(tmp_path):
    for number in range(2):
        write_rows(tmp_path / f"train-0000{number}-of-00002.parquet", ROWS[:3])
    assert [file.name[:11] for file in locate(tmp_path)["train"]] == ["train-00000", "train-00001"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_a_fraction_that_holds_out_nothing_or_all_is_refused(fraction):
    with pytest.raises(ValueError, match=r"data\.val_fraction"):
        held_out(100, np.array([10, 100]), fraction)


def test_at_least_one_document_is_held_out_and_one_is_not():
    assert held_out(100, np.array([10, 50, 100]), 0.01) == 50
    assert held_out(100, np.array([10, 50, 100]), 0.99) == 10
    assert held_out(100, np.array([100]), 0.25) == 75


def test_pieces_have_the_tokens_of_the_whole_text():
    gpt2 = make_tokenizer("gpt2")
    text = "".join(random.Random(0).choices(["\n", " ", "  ", "a", "it's", "12", "\n\n", "é", "\t", "\r\n"], k=20_000))
    cut = list(pieces(text, 100))
    assert len(cut) > 100
    assert "".join(cut) == text
    assert np.concatenate([gpt2.encode(piece) for piece in cut]).tolist() == gpt2.encode(text).tolist()


def test_a_column_can_be_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", column="body")
    assert [text for text, _ in texts(path, "body")] == ROWS
    with pytest.raises(ValueError, match="line 1: field `text` is missing"):
        list(texts(path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", "naïve".encode("latin-1"), "byte 2 of the file is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), "byte 1 of the file is zero"),
        ("a.txt", b"<!DOCTYPE html>\n<html>", "HTML page"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("a.txt", gzip.compress(b"text", mtime=0), "is gzip"),
        ("a.txt", b"PK\x03\x04", "zip archive"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"<html>", "HTML page"),
        ("a.jsonl", b'{"text": 3}', "must be str"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"', "line 2: invalid JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "truncated gzip"),
        ("a.parquet", b"PAR1 no", "not a readable parquet file"),
    ],
)
def test_a_broken_text_is_refused_in_a_sentence(tmp_path, find, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as refusal:
        find(tmp_path / name)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_text_that_only_begins_with_a_bracket_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("<unk> is a word")
    assert read_text(tmp_path / "a.txt") == "<unk> is a word"


@pytest.mark.parametrize(
    ("path", "said"), [("nowhere.txt", "does not exist"), ("", "has no train, val"), ("*.x", "matches no file")]
)
def test_no_file_at_all_is_said(tmp_path, find, path, said):
    with pytest.raises(FileNotFoundError, match=said):
        find(tmp_path / path)


def test_100_damaged_texts_are_each_read_or_refused_in_a_sentence(tmp_path):
    content = "Ünder the lime tree, naïve café 漢字\n".encode() * 20
    path = tmp_path / "damaged.txt"
    for seed in range(100):
        rng = random.Random(seed)
        place = rng.randrange(len(content))
        damaged = [
            content[:place],
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :],
            content[:place] + rng.randbytes(5) + content[place:],
            content[:place] + bytes(rng.randrange(1, 9)) + content[place:],
        ][seed % 4]
        path.write_bytes(damaged)
        try:
            text = read_text(path)
        except ValueError as error:
            sentence = str(error)
            assert path.name in sentence
            assert "\n" not in sentence
        else:
            assert seed % 4 != 3
            assert text.encode() == damaged


# ---- files of tokens

TOKENS = np.random.default_rng(0).integers(50_000, size=2_000).astype(np.uint16)


def test_a_nanogpt_folder_has_its_parts(tmp_path, find):
    write_nanogpt(tmp_path / "train.bin", Stream([TOKENS]))
    write_nanogpt(tmp_path / "val.bin", Stream([TOKENS[:300]]))
    source = find(tmp_path)
    assert {part: len(stream) for part, stream in source.parts.items()} == {"train": 2_000, "val": 300}
    assert (source.vocab_size, source.end) == (50_257, 50_256)
    assert source.largest == (TOKENS.max(), tmp_path / "train.bin")


def test_llmc_shards_are_one_stream(tmp_path, find):
    for number, part in enumerate(("val", "train", "train")):
        tokens = Stream([TOKENS[number * 500 : number * 500 + 500]])
        write_llmc(tmp_path / f"fineweb_{part}_{number:06d}.bin", tokens)
    for path in (tmp_path, tmp_path / "fineweb_*.bin"):
        source = find(path)
        assert (source.parts["val"].read(0, 500) == TOKENS[:500]).all()
        assert (source.parts["train"].read(0, 1_000) == TOKENS[500:1_500]).all()


def test_shards_without_val_hold_out_their_end(tmp_path, find, caplog):
    write_nanogpt(tmp_path / "some.bin", Stream([TOKENS]))
    source = find(tmp_path / "some.bin")
    assert (source.parts["val"].read(0, 200) == TOKENS[1_800:]).all()
    assert len(source.parts["train"]) == 1_800
    assert "no val part" in caplog.text


def test_every_byte_counts_in_the_fingerprint(tmp_path, find):
    write_rows(tmp_path / "a.jsonl")
    write_nanogpt(tmp_path / "train.bin", Stream([TOKENS]))
    prints = [find(tmp_path / "a.jsonl").fingerprint, find(tmp_path / "train.bin").fingerprint]
    assert prints == [find(tmp_path / "a.jsonl").fingerprint, find(tmp_path / "train.bin").fingerprint]
    write_rows(tmp_path / "a.jsonl", [*ROWS[:-1], "Document x."])
    changed = TOKENS.copy()
    changed[1_000] += 1
    write_nanogpt(tmp_path / "train.bin", Stream([changed]))
    assert {find(tmp_path / "a.jsonl").fingerprint, find(tmp_path / "train.bin").fingerprint}.isdisjoint(prints)
    assert find(tmp_path / "a.jsonl", "gpt2").fingerprint != find(tmp_path / "a.jsonl").fingerprint


def test_large_sets_are_fingerprinted_by_blocks_over_the_whole_file(tmp_path, find, monkeypatch):
    monkeypatch.setattr(text_sources, "HASHED_WHOLE", 100)
    monkeypatch.setattr(text_sources, "BLOCK", 8)
    write_nanogpt(tmp_path / "train.bin", Stream([TOKENS]))
    prints = {find(tmp_path).fingerprint}
    for place in (0, 1_999):
        changed = TOKENS.copy()
        changed[place] ^= 1
        write_nanogpt(tmp_path / "train.bin", Stream([changed]))
        prints.add(find(tmp_path).fingerprint)
    assert len(prints) == 3


def test_the_largest_token_is_looked_for_once_while_a_file_stays_as_it_is(tmp_path, find, monkeypatch):
    monkeypatch.setattr(text_sources, "WORTH_KEEPING", 1)
    path = write_nanogpt(tmp_path / "train.bin", Stream([TOKENS]))
    first = find(path).largest
    with monkeypatch.context() as patched:
        patched.setattr(text_sources, "largest", None)  # is not called again
        assert find(path).largest == first
    write_nanogpt(path, Stream([np.append(TOKENS, np.uint16(60_000))]))
    assert find(path).largest == (60_000, path)


# ---- what is kept, the hub, the stand-in


def test_tokens_are_kept_and_found_again(tmp_path, find, monkeypatch):
    monkeypatch.setattr(text_sources, "WORTH_KEEPING", 1)
    path = write_rows(tmp_path / "a.jsonl")
    first = find(path, "gpt2")
    kept = sorted((tmp_path / "cache").iterdir())
    assert [file.suffix for file in kept] == [".tokens", ".tokens", ".json"]
    monkeypatch.setattr(text_sources, "tokenised", None)  # is not called again
    again = find(path, "gpt2")
    for part in ("train", "val"):
        assert (again.parts[part].read(0, 99) == first.parts[part].read(0, 99)).all()
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"\.tokens is damaged: delete it and"):
        find(path, "gpt2")
    kept[2].write_text("{")
    with pytest.raises(ValueError, match=r"\.json is damaged: delete it"):
        find(path, "gpt2")


def test_a_named_hub_set_that_cannot_be_read_is_refused(find, monkeypatch):
    monkeypatch.setattr(text_sources, "hub_answers", lambda: False)
    with pytest.raises(ValueError, match=r"data\.hub=some/set .*does not answer"):
        find(None, hub=NO_HUB | {"name": "some/set", "download": True})
    with pytest.raises(ValueError, match=r"data\.download=false"):
        find(None, hub=NO_HUB | {"name": "some/set"})


def test_a_hub_set_is_streamed_up_to_a_number_of_tokens(tmp_path, find):
    """`datasets` streams a folder as it streams a repository."""
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl")
    hub = NO_HUB | {"name": str(tmp_path / "set"), "tokens": 300, "download": True}
    source = find(None, hub=hub)
    read = text_of(source.parts["train"]) + text_of(source.parts["val"])
    assert "".join(f"{row}\n" for row in ROWS).startswith(read)
    assert 300 <= len(read) < 350
    write_rows(tmp_path / "set" / "train.jsonl", ["other"])
    assert find(None, hub=hub | {"download": False}).fingerprint == source.fingerprint
    with pytest.raises(ValueError, match=r"field `body` is missing"):
        find(None, hub=hub, column="body")


def test_the_standin_is_python_itself_and_says_so(find, caplog):
    source = find(None, val_fraction=0.05)
    assert source.name == "text-standin"
    assert source.standin
    assert "this is the source of Python's standard library" in caplog.text
    sizes = {part: len(stream) for part, stream in source.parts.items()}
    assert sizes["val"] == round(0.05 * sum(sizes.values()))
    assert 3e6 < sum(sizes.values()) < 8e6


# ---- real texts


@real
@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("state_union.jsonl.gz", 61),
        ("inaugural.jsonl.gz", 57),
        ("c4_demo.jsonl", 300),
        ("shakespeare_milton.jsonl.gz", 41),
    ],
)
def test_real_documents_are_read_whole(name, documents):
    read = list(texts(REAL / name))
    assert len(read) == documents
    tokens, ends = tokenised(read, make_tokenizer("bytes"))
    assert len(ends) == documents
    assert len(tokens) == sum(len(text.encode()) + 1 for text, _ in read) == ends[-1]


@real
def test_tiny_shakespeare_has_the_published_numbers_of_tokens(find):
    """nanoGPT's README: 301,966 GPT-2 tokens of the first 90 % of the characters, 36,059 of the rest."""
    text = read_text(REAL / "tiny_shakespeare.txt")
    cut = int(len(text) * 0.9)
    gpt2 = make_tokenizer("gpt2")
    assert [len(gpt2.encode(part)) for part in (text[:cut], text[cut:])] == [301_966, 36_059]
    source = find(REAL / "tiny_shakespeare.txt", "gpt2")
    assert sum(len(stream) for stream in source.parts.values()) == 338_025


@real
def test_wikitext_has_its_published_words():
    parts = locate(REAL / "wikitext2")
    words = {part: sum(len(text.split()) for text, _ in texts(files[0])) for part, files in parts.items()}
    assert words == {"val": 213_886, "test": 241_211}
