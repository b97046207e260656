"""llm.c's evaluation files are written as it writes them, read back whole, and refused when damaged."""

import json
import random

import numpy as np
import pytest

from datamodules.hellaswag import Example, read_examples, read_hellaswag, write_examples

EXAMPLES = [
    Example(0, 2, [5, 6, 7], [[8], [9, 10], [11], [12, 13, 14]]),
    Example(1, 0, [50_256], [[1, 2], [3], [4], [65_534]]),
]


def test_a_file_has_the_layout_that_llmc_reads(tmp_path):
    content = np.frombuffer(write_examples(tmp_path / "val.bin", EXAMPLES).read_bytes(), "<u2")
    header = content[:512].view("<i4")
    assert header[:4].tolist() == [20240522, 1, 2, 2 * 20]
    assert not header[4:].any()
    first = [65_535, 40, 0, 2, 4, 3, 5, 6, 7, 1, 8, 2, 9, 10, 1, 11, 3, 12, 13, 14]
    assert content[512 : 512 + 20].tolist() == first
    assert content[532:536].tolist() == [65_535, 2 * 16, 1, 0]


def test_examples_are_read_as_they_were_written(tmp_path):
    assert read_examples(write_examples(tmp_path / "val.bin", EXAMPLES)) == EXAMPLES


@pytest.mark.parametrize(
    "example",
    [
        Example(0, 0, [], [[1], [2]]),
        Example(0, 0, [1], [[1], []]),
        Example(0, 0, [65_535], [[1]]),
        Example(0, 0, [1] * 40_000, [[1]]),
        Example(-1, 0, [1], [[1]]),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(tmp_path, example):
    with pytest.raises(ValueError, match="example 0"):
        write_examples(tmp_path / "val.bin", [example])
    assert list(tmp_path.iterdir()) == []


def test_100_damaged_files_are_each_read_or_refused_in_a_sentence(tmp_path):
    content = write_examples(tmp_path / "val.bin", EXAMPLES * 5).read_bytes()
    path = tmp_path / "damaged.bin"
    for seed in range(100):
        rng = random.Random(seed)
        place = rng.choice((rng.randrange(16), rng.randrange(1_024, len(content))))
        flipped = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        path.write_bytes(content[:place] if seed % 2 else flipped)
        try:
            examples = read_examples(path)
        except ValueError as error:
            sentence = str(error)
            assert path.name in sentence
            assert "\n" not in sentence
        else:
            assert not seed % 2  # a token, a label or an index that was changed to another one
            assert len(examples) == 10


def test_rows_of_hellaswag_become_tokens(tmp_path):
    row = {"ind": 4, "ctx": "A man", "endings": ["runs.", "sits."], "label": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "label": "0"}))
    first, second = read_hellaswag(tmp_path / "rows.jsonl", lambda text: list(text.encode()))
    assert first == Example(0, 1, list(b"A man"), [list(b" runs."), list(b" sits.")])
    assert second.label == 0


@pytest.mark.parametrize("change", [{"label": 2}, {"label": None}, {"label": ""}, {"endings": ["a", ""]}, {"ctx": 3}])
def test_a_bad_row_of_hellaswag_is_named(tmp_path, change):
    row = {"ctx": "A man", "endings": ["runs.", "sits."], "label": 1} | change
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1"):
        read_hellaswag(tmp_path / "rows.jsonl", lambda text: list(text.encode()))
