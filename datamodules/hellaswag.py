"""Multiple-choice examples such as HellaSwag (arXiv 1905.07830): llm.c's evaluation files, and rows of JSON.

A file has a header of 256 int32 (magic, version, number of examples, bytes of the longest one). An example is uint16: a
mark, its bytes, its index, the label, the number of completions, then context and completions, each with its length
before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.jsonl import field, read_jsonl, regular_file
from datamodules.shards import EXAMPLES, HEADER, HEADER_BYTES, appearing_whole

VERSION = 1
MARK = 2**16 - 1  # begins an example, and is no token


@dataclass(frozen=True)
class Example:
    """Tokens of a context and of the completions between which one chooses; `label` is the right one's place."""

    index: int
    label: int
    context: list[int]
    completions: list[list[int]]


def read_examples(path: Path | str) -> list[Example]:
    """The examples of an llm.c evaluation file. Raises FileNotFoundError or ValueError naming file and example."""
    path = regular_file(path)
    content = path.read_bytes()
    header = np.frombuffer(content[:HEADER_BYTES][: len(content) // 4 * 4], "<i4")
    if not len(header) or int(header[0]) != EXAMPLES:
        found = int(header[0]) if len(header) else "nothing"
        raise ValueError(f"{path} begins with {found} and not with {EXAMPLES}: it is no evaluation file of llm.c")
    if len(header) < HEADER or header[1] != VERSION or len(content) % 2:
        raise ValueError(f"{path} has a broken header, another version than {VERSION}, or half a token: write it anew")
    numbers = np.frombuffer(content[HEADER_BYTES:], "<u2").tolist()
    examples, begin = [], 0
    while begin < len(numbers):
        example, begin = _example(numbers, begin, f"{path}, example {len(examples)}")
        examples.append(example)
    if len(examples) != header[2]:
        raise ValueError(
            f"{path} should have {header[2]} examples by its header and has {len(examples)}: write it anew"
        )
    return examples


def _example(numbers: list[int], begin: int, where: str) -> tuple[Example, int]:
    """The example at `begin`, and where the next one begins."""
    if numbers[begin] != MARK or len(numbers) < begin + 6:
        raise ValueError(f"{where} does not begin as an example does: the file is cut short or damaged, write it anew")
    size, index, label, count = numbers[begin + 1 : begin + 5]
    runs, place = [], begin + 5
    for _ in range(1 + count):
        length = numbers[place] if place < len(numbers) else 0
        runs.append(numbers[place + 1 : place + 1 + length])
        place += 1 + length
    if (
        MARK in numbers[begin + 1 : place]
        or 2 * (place - begin) != size
        or place > len(numbers)
        or label >= count
        or not all(runs)
    ):
        raise ValueError(
            f"{where}: its lengths, label or tokens do not fit together: the file is damaged, write it anew"
        )
    return Example(index, label, runs[0], runs[1:]), place


def write_examples(path: Path, examples: Sequence[Example]) -> Path:
    """The file that llm.c reads. Raises ValueError for an example that its format cannot hold."""
    runs = [_numbers(example, f"{path}, example {number}") for number, example in enumerate(examples)]
    header = np.zeros(HEADER, "<i4")
    header[:4] = EXAMPLES, VERSION, len(runs), max((2 * len(run) for run in runs), default=0)
    with appearing_whole(path) as file:
        file.write(header.tobytes())
        file.writelines(np.array(run, "<u2").tobytes() for run in runs)
    return path


def _numbers(example: Example, where: str) -> list[int]:
    runs = [example.context, *example.completions]
    numbers = [MARK, 0, example.index, example.label, len(example.completions)]
    for run in runs:
        numbers += [len(run), *run]
    numbers[1] = 2 * len(numbers)
    if not all(runs) or numbers[1] >= MARK or min(numbers[1:]) < 0 or max(numbers[1:]) >= MARK:
        raise ValueError(
            f"{where} has an empty text, or a number above {MARK - 1}, which the format cannot hold: shorten it"
        )
    return numbers


def read_hellaswag(path: Path | str, encode: Callable[[str], list[int]]) -> list[Example]:
    """HellaSwag's own rows (`ctx`, `endings`, `label`) as tokens; a completion is encoded with the blank before it."""
    examples = []
    for line, row in read_jsonl(path):
        endings = field(row, "endings", list, path, line)
        label = row.get("label")
        label = int(label) if isinstance(label, str) and label.isdecimal() else field(row, "label", int, path, line)
        if not all(isinstance(ending, str) and ending.strip() for ending in endings) or not 0 <= label < len(endings):
            raise ValueError(f"{path}, line {line}: `endings` must be texts, and `label` the number of one of them")
        context = encode(field(row, "ctx", str, path, line))
        examples.append(Example(line - 1, label, context, [encode(f" {ending}") for ending in endings]))
    return examples
