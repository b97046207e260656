"""Damage of every kind to a GSM8K file ends in a correct read or in one sentence, never in another error or a hang."""

import json
import os
import random
from pathlib import Path

import pytest

from datamodules.problems import Problem, read_gsm8k
from datamodules.standin import generate

REAL = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "gsm8k" / "train.jsonl"


def standin_lines() -> list[bytes]:
    return [json.dumps({"question": p.question, "answer": p.solution}).encode() for p in generate(40, seed=0)]


def real_lines() -> list[bytes]:
    if not REAL.exists():
        pytest.skip(f"no real data in {REAL}")
    lines = REAL.read_bytes().split(b"\n")
    row = next(i for i, line in enumerate(lines) if b"\\u2028" in line)
    return [*lines[:40], json.dumps(json.loads(lines[row]), ensure_ascii=False).encode()]


def byte_flip(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def line_swap(rng: random.Random, content: bytes) -> bytes:
    """Two lines change places, or their halves do."""
    lines = content.split(b"\n")
    i, j = rng.sample(range(len(lines)), 2)
    half = rng.choice((0, 40))
    lines[i], lines[j] = lines[j][:half] + lines[i][half:], lines[i][:half] + lines[j][half:]
    return b"\n".join(lines)


def change(rng: random.Random, content: bytes, value: str) -> bytes:
    """The value of one field becomes `value`."""
    lines = content.split(b"\n")
    i, key = rng.randrange(len(lines)), rng.choice(("question", "answer"))
    row = json.loads(lines[i])
    row[key] = "@"
    lines[i] = json.dumps(row).replace('"@"', value).encode()
    return b"\n".join(lines)


def type_change(rng: random.Random, content: bytes) -> bytes:
    return change(rng, content, rng.choice(("1", "-2.5", "null", "true", "[]", "{}", '["a"]', "NaN", "1e999")))


def empty_field(rng: random.Random, content: bytes) -> bytes:
    return change(rng, content, rng.choice(('""', '" "', '"\\n"', '"\\u00a0"')))


def huge_integer(rng: random.Random, content: bytes) -> bytes:
    digits = "9" * rng.choice((101, 4_301, 100_000))
    return change(rng, content, rng.choice((digits, f'"#### {digits}"', "[" * 5_000)))


def wrong_encoding(rng: random.Random, content: bytes) -> bytes:
    encoding = rng.choice(("utf-16", "utf-16-le", "utf-32", "cp1252", "utf-7", "cp500"))
    return content.decode().encode(encoding, errors="replace")


def insertion(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.choice((1, 5, 50))) + content[place:]


def duplicate_line(rng: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    return b"\n".join([*lines, rng.choice(lines)])


MUTATIONS = [
    byte_flip, cut, line_swap, type_change, empty_field, huge_integer, wrong_encoding, insertion, duplicate_line,
]  # fmt: skip
NEVER_READ = {type_change, empty_field, duplicate_line}


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("lines", [standin_lines, real_lines])
def test_200_damaged_files_are_each_read_right_or_refused_in_a_sentence(tmp_path, lines):
    content = b"\n".join(lines())
    for seed in range(200):
        rng = random.Random(seed)
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        path = tmp_path / f"{seed}.jsonl"
        path.write_bytes(mutate(rng, content))
        try:
            read = read_gsm8k(path)
        except ValueError as error:
            sentence = str(error)
            assert "\n" not in sentence
            assert path.name in sentence
            assert len(sentence) < 500 + len(str(path))
        else:
            assert mutate not in NEVER_READ
            assert all(
                isinstance(problem, Problem) and problem.question and "####" in problem.solution for problem in read
            )


def test_an_undamaged_file_is_read_whole(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(standin_lines()))
    assert [problem.solution for problem in read_gsm8k(tmp_path / "rows.jsonl")] == [
        problem.solution for problem in generate(40, seed=0)
    ]
