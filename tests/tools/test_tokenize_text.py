"""Shards written by tools.tokenize_text are those that Text reads from the text itself, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from datamodules.shards import open_shard
from datamodules.text_sources import find_text
from datamodules.tokenizers import make_tokenizer
from tools import tokenize_text
from tools.tokenize_text import tokenize

ROWS = [f"Document {n}.\nIt has {n} words or so, naïve ones.\n" * (1 + n % 5) for n in range(60)]
NO_HUB = {"name": None, "config": None, "tokens": 100, "download": False}


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return str(tmp_path / "my rows.jsonl")


def stream(folder: Path, part: str) -> np.ndarray:
    files = sorted(file for file in folder.iterdir() if part in file.name)
    return np.concatenate([open_shard(file).open() for file in files])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def read(path, name):
    settings = {"hub": NO_HUB, "column": "text", "val_fraction": 0.1, "cache": Path("unused")}
    return find_text(path, lambda: make_tokenizer(name), **settings).parts


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_nanogpt_files_are_what_text_reads_from_the_documents(tmp_path, rows, tokenizer):
    counts = tokenize(rows, tmp_path / "out", tokenizer, form="nanogpt", val_fraction=0.1)
    assert sorted(contents(tmp_path / "out")) == ["train.bin", "val.bin"]
    for part, expected in read(rows, tokenizer).items():
        written = stream(tmp_path / "out", part)
        assert counts[part] == len(written)
        assert (written == expected.read(0, len(expected))).all()


def test_llmc_shards_have_the_end_token_before_each_document(tmp_path, rows):
    tokenize(rows, tmp_path / "out", shard_tokens=500, val_fraction=0.1)
    names = sorted(contents(tmp_path / "out"))
    assert names[0] == "my-rows_train_000001.bin"
    assert names[-1] == "my-rows_val_000000.bin"
    lengths = [len(open_shard(tmp_path / "out" / name)) for name in names[:-1]]
    assert set(lengths[:-1]) == {500}
    assert 0 < lengths[-1] <= 500
    decode = make_tokenizer("gpt2").decode
    text = "".join(f"<|endoftext|>{row}" for row in ROWS)
    assert decode(stream(tmp_path / "out", "train").tolist()) + decode(stream(tmp_path / "out", "val").tolist()) == text


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(tokenize_text, "BATCH", 300)
    for workers in (1, 2):
        tokenize(rows, tmp_path / str(workers), shard_tokens=500, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_plain_text_is_split_as_text_splits_it(tmp_path):
    (tmp_path / "a.txt").write_text("".join(ROWS))
    tokenize(str(tmp_path / "a.txt"), tmp_path / "out", val_fraction=0.1)
    for part, expected in read(tmp_path / "a.txt", "gpt2").items():
        assert (stream(tmp_path / "out", part) == expected.read(0, len(expected))).all()


def test_parts_that_are_given_stay_parts(tmp_path):
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text(part * 9)
    assert tokenize(str(tmp_path), tmp_path / "out", "bytes") == {"train": 45, "val": 45, "test": 36}
    assert bytes(stream(tmp_path / "out", "_test_").tolist()).decode() == "test" * 9


def test_what_cannot_be_done_leaves_nothing(tmp_path, rows):
    before = sorted(tmp_path.rglob("*"))
    Path(rows).write_text(Path(rows).read_text() + '{"text": 3}\n')
    refusals = {
        "line 61: field `text` must be str": {},
        "shard-tokens": {"shard_tokens": 0},
        "cannot be read": {"tokenizer": str(tmp_path / "nothing")},
        "does not exist": {"source": str(tmp_path / "nothing.txt")},
    }
    for said, changes in refusals.items():
        with pytest.raises((ValueError, OSError), match=said):
            tokenize(**{"source": rows, "output": tmp_path / "out"} | changes)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_there_is_not_touched(tmp_path, rows):
    (tmp_path / "out").mkdir()
    tokenize(rows, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match="is there already"):
        tokenize(rows, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="holds tokens already"):
        tokenize(str(tmp_path / "out"), tmp_path / "again")


def run(*words: str) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tools.tokenize_text", *words]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_command_says_what_it_wrote_or_why_not(tmp_path, rows):
    out, err = (done := run("--input", rows, "--output", str(tmp_path / "out"), "--workers", "2")).communicate()
    assert done.returncode == 0, err
    assert "tokens of train" in out
    assert "tokens of val" in out
    _, err = (done := run("--input", str(tmp_path / "x"), "--output", str(tmp_path / "y"))).communicate()
    assert done.returncode == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_command_that_is_stopped_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("".join(ROWS) * 3_000)
    running = run("--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), "--workers", "1")
    while not list(tmp_path.glob(".out-*/train")) and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    running.communicate()
    assert running.returncode == 143
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
