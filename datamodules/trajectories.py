"""Scored responses read from a file, for learning without sampling.

Three layouts are told apart by the fields of a row: GSM8K's published model solutions ({question, ground_truth, one
{solution, is_correct} per model}), sampled lists ({problem, answer, responses, correct}), and plain rows ({question or
prompt, response, reward, optional gold and id}).
"""

import hashlib
import logging
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from datamodules.answers import Score, plain_number
from datamodules.jsonl import field
from datamodules.problems import ID_FIELDS, read_rows

log = logging.getLogger(__name__)

QUESTION_FIELDS = ("question", "problem", "prompt")


@dataclass(frozen=True)
class Response:
    """One answer to a question with its recorded reward; `sample` counts the answers to the same prompt from 0."""

    prompt_id: str
    sample: int
    question: str
    response: str
    gold: str | None
    reward: float


def read_trajectories(path: Path | str, scorer: Callable[[str, str], Score] | None = None) -> list[Response]:
    """The responses of a file in order. Empty ones are dropped, and their number logged.

    Rewards are taken from the file. With a `scorer`, one warning says how many 0/1 rewards it disagrees with. Raises
    ValueError naming file, line and field, also for a missing, non-numeric, NaN or infinite reward.
    """
    path = Path(path)
    questions: dict[str, str] = {}
    responses, samples, empty = [], Counter(), 0
    for line, record in read_rows(path):
        for response in _responses(record, path, line):
            _check_prompt(response, questions, path, line)
            numbered = _numbered(response, samples)
            if response.response.strip():
                responses.append(numbered)
            else:
                empty += 1
    if "ground_truth" in record:
        log.warning("%s answers GSM8K's test questions: what learns from it must not be tested on them", path)
    if empty:
        log.warning("%s: %d empty responses dropped", path, empty)
    if not responses:
        raise ValueError(f"{path} has no response that is not empty: give data.trajectories another file")
    if scorer is not None:
        _report_agreement(responses, scorer, path)
    return responses


def _responses(record: dict, path: Path, line: int) -> Iterator[Response]:
    if "ground_truth" in record:
        return _published(record, path, line)
    if "responses" in record:
        return _sampled(record, path, line)
    return iter([_plain(record, path, line)])


def _published(record: dict, path: Path, line: int) -> Iterator[Response]:
    """Every model's solution in the row's order; its last line `A: 18` becomes `#### 18`, as GSM8K's own end."""
    question, truth = _question(record, path, line), field(record, "ground_truth", str, path, line)
    gold = plain_number(truth.rpartition("A:")[2])
    if gold is None:
        raise ValueError(f"{path}, line {line}: field `ground_truth` must end in `A: <number>`")
    prompt_id = _prompt_id(record, question, path, line)
    models = [key for key in record if key not in ("question", "ground_truth", *ID_FIELDS)]
    for model in models:
        solution = field(record, model, dict, path, line)
        text = re.sub(r"(?m)^A: (?=[^\n]*\Z)", "#### ", _text(solution, "solution", path, line))
        right = field(solution, "is_correct", bool, path, line)
        yield Response(prompt_id, 0, question, text, gold, float(right))


def _sampled(record: dict, path: Path, line: int) -> Iterator[Response]:
    question, gold = _question(record, path, line), field(record, "answer", str, path, line)
    texts, flags = field(record, "responses", list, path, line), field(record, "correct", list, path, line)
    if len(texts) != len(flags):
        raise ValueError(f"{path}, line {line}: {len(texts)} `responses` but {len(flags)} values in field `correct`")
    prompt_id = _prompt_id(record, question, path, line)
    for text, right in zip(texts, flags):
        text = _text({"responses": text}, "responses", path, line)
        right = field({"correct": right}, "correct", bool, path, line)
        yield Response(prompt_id, 0, question, text, gold, float(right))


def _plain(record: dict, path: Path, line: int) -> Response:
    question, text = _question(record, path, line), _text(record, "response", path, line)
    reward = field(record, "reward", float, path, line)
    gold = None if record.get("gold") is None else field(record, "gold", str, path, line)
    return Response(_prompt_id(record, question, path, line), 0, question, text, gold, reward)


def _question(record: dict, path: Path, line: int) -> str:
    return field(record, next((key for key in QUESTION_FIELDS if key in record), "question"), str, path, line)


def _text(record: dict, key: str, path: Path, line: int) -> str:
    """A text that may be blank: a policy may answer nothing."""
    text = record.get(key)
    return text if isinstance(text, str) and not text.strip() else field(record, key, str, path, line)


def _prompt_id(record: dict, question: str, path: Path, line: int) -> str:
    """The row's own id of the prompt, or a digest of the question, so that equal questions are one prompt."""
    key = next((key for key in ID_FIELDS if record.get(key) is not None), None)
    if key is None:
        return hashlib.sha1(question.encode()).hexdigest()[:16]
    return str(field(record, key, int if isinstance(record[key], int) else str, path, line))


def _numbered(response: Response, samples: Counter) -> Response:
    """The response as the next one of its prompt."""
    samples[response.prompt_id] += 1
    return replace(response, sample=samples[response.prompt_id] - 1)


def _check_prompt(response: Response, questions: dict[str, str], path: Path, line: int) -> None:
    if questions.setdefault(response.prompt_id, response.question) != response.question:
        raise ValueError(
            f"{path}, line {line}: field `id` {reprlib.repr(response.prompt_id)} stood for another question before: "
            "give each prompt its own id"
        )


def _report_agreement(responses: list[Response], scorer: Callable[[str, str], Score], path: Path) -> None:
    scored = [each for each in responses if each.gold is not None and each.reward in (0.0, 1.0)]
    differ = sum(scorer(each.response, each.gold).correct != bool(each.reward) for each in scored)
    if differ:
        log.warning("%s: the scorer disagrees with %d of %d recorded 0/1 rewards", path, differ, len(scored))
