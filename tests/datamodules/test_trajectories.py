"""Recorded responses keep their order and their rewards, whatever the layout; bad ones are named."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from datamodules.answers import BoxedAnswer, NumberAnswer
from datamodules.trajectories import Response, read_trajectories

REAL = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data"))
real = pytest.mark.skipif(not (REAL / "gsm8k" / "train.jsonl").exists(), reason=f"no real data in {REAL}")


def write(folder: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@real
def test_gsm8ks_published_solutions_have_their_counts_and_agree_with_the_scorer(caplog):
    responses = read_trajectories(REAL / "gsm8k" / "example_model_solutions.jsonl", NumberAnswer())
    assert len(responses) == 4 * 1_319
    assert [sum(each.reward for each in responses if each.sample == model) for model in range(4)] == [
        286,
        515,
        458,
        742,
    ]
    assert len({each.prompt_id for each in responses}) == 1_319
    assert "must not be tested on them" in caplog.text
    assert "disagrees" not in caplog.text


@real
def test_maths_sampled_responses_have_their_counts_and_agree_with_the_scorer(caplog):
    responses = read_trajectories(REAL / "math" / "math_samples_8.jsonl", BoxedAnswer())
    assert (len(responses), sum(each.reward for each in responses)) == (600, 550)
    right = Counter()
    for each in responses:
        right[each.prompt_id] += int(each.reward)
    assert Counter(right.values())[8] == 65
    assert Counter(right.values())[0] == 2
    assert "disagrees" not in caplog.text


def test_a_published_solution_ends_as_gsm8ks_do(tmp_path):
    row = {"question": "q", "ground_truth": "..\nA: 1,800", "m": {"solution": "A: no\nA: 18", "is_correct": False}}
    (response,) = read_trajectories(write(tmp_path, row))
    assert (response.response, response.gold, response.reward) == ("A: no\n#### 18", "1800", 0.0)


def test_plain_rows_are_read_in_order_with_samples_counted_per_prompt(tmp_path):
    path = write(
        tmp_path,
        {"question": "a", "response": "x", "reward": 1},
        {"prompt": "b", "response": "y", "reward": -0.5, "gold": "3"},
        {"question": "a", "response": "z", "reward": 0.25},
        {"question": "c", "response": "w", "reward": 0, "id": 12},
    )
    one, two, three, four = read_trajectories(path)
    assert (one.prompt_id, one.sample, three.sample) == (three.prompt_id, 0, 1)
    assert (two.question, two.gold, two.reward) == ("b", "3", -0.5)
    assert four == Response("12", 0, "c", "w", None, 0.0)


def test_empty_responses_are_dropped_counted_and_keep_their_sample_number(tmp_path, caplog):
    rows = [{"question": "a", "response": text, "reward": 0} for text in ("x", "", " \n", "y")]
    assert [each.sample for each in read_trajectories(write(tmp_path, *rows))] == [0, 3]
    assert "2 empty responses dropped" in caplog.text
    with pytest.raises(ValueError, match="no response that is not empty"):
        read_trajectories(write(tmp_path, rows[1]))


def test_a_scorer_that_disagrees_is_reported_and_changes_nothing(tmp_path, caplog):
    rows = [{"question": "q", "response": f"#### {n}", "reward": 1, "gold": "5"} for n in (5, 6)]
    responses = read_trajectories(write(tmp_path, *rows), NumberAnswer())
    assert [each.reward for each in responses] == [1.0, 1.0]
    assert "disagrees with 1 of 2" in caplog.text


PLAIN = {"question": "q", "response": "r", "reward": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "response": "r"}, "`reward` is missing"),
        ({**PLAIN, "reward": None}, "`reward` is missing"),
        ({**PLAIN, "reward": "1"}, "`reward` must be float"),
        ({**PLAIN, "reward": True}, "`reward` must be float"),
        ('{"question": "q", "response": "r", "reward": NaN}', "NaN is not JSON"),
        ('{"question": "q", "response": "r", "reward": Infinity}', "Infinity is not JSON"),
        ('{"question": "q", "response": "r", "reward": 1e999}', "overflows"),
        ({"question": "q", "reward": 1}, "`response` is missing"),
        ({**PLAIN, "response": None}, "`response` is missing"),
        ({**PLAIN, "response": ["r"]}, "`response` must be str"),
        ({"response": "r", "reward": 1}, "`question` is missing"),
        ({**PLAIN, "gold": 5}, "`gold` must be str"),
        ({**PLAIN, "question": "other", "id": "one"}, "stood for another question"),
        (
            {"question": "q", "ground_truth": "no", "m": {"solution": "s", "is_correct": True}},
            "`ground_truth` must end",
        ),
        ({"question": "q", "ground_truth": "A: 1", "m": {"solution": "s"}}, "`is_correct` is missing"),
        (
            {"question": "q", "ground_truth": "A: 1", "m": {"solution": "s", "is_correct": 1}},
            "`is_correct` must be bool",
        ),
        ({"question": "q", "ground_truth": "A: 1", "m": "s"}, "`m` must be dict"),
        ({"problem": "p", "answer": "1", "responses": ["a", "b"], "correct": [True]}, "2 `responses` but 1 values"),
        ({"problem": "p", "answer": "1", "responses": ["a"], "correct": ["yes"]}, "`correct` must be bool"),
        ({"problem": "p", "answer": "1", "responses": [3], "correct": [True]}, "`responses` must be str"),
    ],
)
def test_a_bad_row_is_named_with_its_field(tmp_path, row, said):
    path = write(tmp_path, {**PLAIN, "id": "one"}, row)
    with pytest.raises(ValueError, match=r"^[^\n]*rows\.jsonl, line 2: [^\n]*$") as caught:
        read_trajectories(path)
    assert said in str(caught.value)
