"""The generated problems are exact GSM8K rows, and only the rows to imitate carry errors."""

import re

import pytest

from datamodules import standin
from datamodules.answers import BoxedAnswer, NumberAnswer
from datamodules.process_reward import MARK, is_right

SIZES = {"sft": 300, "prompts": 100, "val": 50, "test": 80}


def test_3000_gold_rows_pass_their_own_scorer_and_every_mark_is_right():
    for problem in standin.generate(3_000, seed=0):
        assert NumberAnswer()(problem.solution, problem.gold).correct
        assert all(is_right(mark[1]) for mark in MARK.finditer(problem.solution))


def test_one_seed_makes_one_text_whatever_was_drawn_before():
    assert standin.generate(50, 3, 0.6, 0.2) == standin.generate(80, 3, 0.6, 0.2)[:50]
    assert standin.generate(50, 3) != standin.generate(50, 4)
    first = standin.generate(1, 0)[0]
    assert first.question == "Sam has 2 pens. Eva makes it 3 times more. Sam loses 5. How many pens does Sam have?"
    assert first.solution == "Sam has 2*3 = <<2*3=6>>6 pens.\nSam has 6-5 = <<6-5=1>>1 pens.\n#### 1"


def test_62_percent_of_problems_have_a_times_step_and_questions_hardly_repeat():
    problems = standin.generate(10_000, seed=1)
    assert sum("times" in problem.question for problem in problems) / 10_000 == pytest.approx(0.62, abs=0.015)
    assert len({problem.question for problem in problems[:5_000]}) >= 4_975


def test_rows_have_two_to_four_lines_of_work_and_values_in_1_to_40():
    for problem in standin.generate(1_000, seed=2, misconception=0.6, slip=0.5):
        *work, last = problem.solution.split("\n")
        assert 2 <= len(work) <= 4
        values = [int(re.search(r"=(\d+)>>\1 [a-z]+\.$", line)[1]) for line in work]
        assert last == f"#### {values[-1]}"
        assert all(1 <= value <= 40 for value in values)


def test_a_misconception_works_times_as_plus_and_nothing_else():
    marks = [
        mark[1]
        for problem in standin.generate(5_000, seed=0, misconception=0.6)
        for mark in MARK.finditer(problem.solution)
    ]
    wrong = [mark for mark in marks if not is_right(mark)]
    assert all("*" in mark and is_right(mark.replace("*", "+")) for mark in wrong)
    telling = [mark for mark in marks if "*" in mark and not mark.startswith("2*2=")]
    assert len(wrong) / len(telling) == pytest.approx(0.6, abs=0.03)


def test_a_slip_is_one_step_off_by_one_or_two():
    problems = standin.generate(3_000, seed=0, slip=0.3)
    slipped = [[m[1] for m in MARK.finditer(problem.solution) if not is_right(m[1])] for problem in problems]
    assert {len(marks) for marks in slipped} == {0, 1}
    assert sum(map(len, slipped)) / 3_000 == pytest.approx(0.3, abs=0.03)
    for (mark,) in filter(None, slipped):
        expression, value = mark.split("=")
        assert any(is_right(f"{expression}={int(value) + off}") for off in (-2, -1, 1, 2))


def test_parts_share_no_question_and_only_sft_has_errors():
    parts = standin.split(SIZES, seed=0, misconception=1.0, slip=1.0)
    assert {part: len(rows) for part, rows in parts.items()} == SIZES
    questions = [problem.question for rows in parts.values() for problem in rows]
    ids = [problem.id for rows in parts.values() for problem in rows]
    assert len(set(questions)) == len(set(ids)) == sum(SIZES.values())
    right = {part: sum(NumberAnswer()(p.solution, p.gold).correct for p in rows) for part, rows in parts.items()}
    assert (right["prompts"], right["val"], right["test"]) == (100, 50, 80)
    assert right["sft"] < 100


def test_the_test_part_stays_when_the_training_part_grows():
    small, large = standin.split(SIZES, 0, 0.6), standin.split(SIZES | {"sft": 2_000}, 0, 0.6)
    assert (small["test"], small["val"]) == (large["test"], large["val"])


def test_boxed_rows_are_the_same_problems_with_maths_ending():
    for hashed, framed in zip(standin.generate(200, 5), standin.generate(200, 5, boxed=True)):
        assert (hashed.question, hashed.gold) == (framed.question, framed.gold)
        assert framed.solution.endswith(f"\nThe answer is $\\boxed{{{framed.gold}}}$.")
        assert BoxedAnswer()(framed.solution, framed.gold).correct


def test_a_chance_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"misconception is a probability, got 1\.5"):
        standin.generate(1, 0, misconception=1.5)
    with pytest.raises(ValueError, match="slip"):
        standin.split(SIZES, 0, slip=-0.1)


def test_more_questions_than_there_are_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(standin, "NAMES", ("Tom", "Ana"))
    monkeypatch.setattr(standin, "ITEMS", ("pens",))
    monkeypatch.setattr(standin, "_operation", lambda *_, **__: ("+", 1))
    with pytest.raises(ValueError, match="no more new questions"):
        standin.split({"test": 10_000}, 0)
