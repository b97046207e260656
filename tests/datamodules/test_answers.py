"""What counts as the answer of a text, and which answers are the same."""

import os
import re
import signal
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import answers
from datamodules.answers import (
    BoxedAnswer,
    NumberAnswer,
    arithmetic,
    boxed,
    flexible_number,
    normalise_math,
    number,
    same_math,
    strict_number,
)


def upstream(text: str) -> str | None:
    """What openai/grade-school-math's dataset.py extracts: the comparison, not something we use."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match.group(1).strip().replace(",", "") if match else None


EXTRACTION = [  # text, upstream, ours strict, ours flexible
    ("#### 72", "72", "72", "72"),
    ("#### 72.", "72.", "72", "72"),
    ("#### 72.00", "72.00", "72.00", "72.00"),
    ("#### 1,234", "1234", "1234", "1234"),
    ("#### $18", None, "18", "18"),
    ("####72", None, "72", "72"),
    ("####  5", None, "5", "5"),
    ("so 7 #### 8 #### 9", "8", "8", "9"),
    ("#### 5%", "5", "5", "5"),
    ("#### 3 dollars", "3", "3", "3"),
    ("#### 1,", "1", "1", "1"),
    ("#### -5", "-5", "-5", "-5"),
    ("#### -$5", None, "-5", "-5"),
    ("#### $-5", None, "-5", "-5"),
    ("#### −5", None, "-5", "-5"),
    ("####\u00a05", None, "5", "5"),
    ("#### \u200b5", None, "5", "5"),
    ("#### .5", ".5", ".5", ".5"),
    ("#### none", None, None, None),
    ("the answer is 12", None, None, "12"),
    ("from 16-3 and 5–4", None, None, "4"),
    ("A: 8.75", None, None, "8.75"),
    ("", None, None, None),
    ("####", None, None, None),
    ("#### ...", "...", None, None),
]


@pytest.mark.parametrize(("text", "theirs", "strict", "flexible"), EXTRACTION)
def test_extraction_follows_the_table(text, theirs, strict, flexible):
    assert (upstream(text), strict_number(text), flexible_number(text)) == (theirs, strict, flexible)


@pytest.mark.parametrize("text", ["#### 72", "#### 72.", "#### 72.00", "#### 72.0 dollars", "#### $72", "#### 0072"])
def test_every_spelling_of_the_gold_number_is_right(text):
    assert NumberAnswer()(text, "72").correct


def test_a_number_with_two_points_is_no_answer():
    assert strict_number("#### 1.2.3") is None


@pytest.mark.parametrize("extract", ["strict", "flexible"])
def test_no_answer_is_wrong_and_never_equals_no_answer(extract):
    score = NumberAnswer(extract)("I do not know", "5")
    assert (score.extracted, score.correct) == (None, False)
    assert not BoxedAnswer()("I do not know", r"\boxed{}").correct
    assert not BoxedAnswer()(r"\boxed{}", "").correct
    assert not same_math("%", "", 1.0)


def test_a_gold_answer_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="'seven' is not a number"):
        NumberAnswer()("#### 7", "seven")


def test_an_unknown_way_to_extract_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"strict, flexible, got 'loose': set data\.extract"):
        NumberAnswer("loose")


def test_an_endless_number_is_text_not_arithmetic():
    digits = "9" * 100_000
    assert number(digits) is None
    assert not NumberAnswer()(f"#### {digits}", "5").correct
    assert not NumberAnswer("flexible")(digits, "5").correct
    assert not BoxedAnswer()(rf"\boxed{{{digits}}}", "5").correct
    assert BoxedAnswer()(rf"\boxed{{{digits}}}", digits).correct


def test_votes_for_one_number_are_counted_together():
    assert len({NumberAnswer().canonical(text) for text in ("72", "72.0", "72.", "1e", "0.5", ".50")}) == 3
    assert len({BoxedAnswer().canonical(text) for text in (r"\frac12", "0.5", "2/4", r"\dfrac{1}{2}", "1")}) == 2


def test_versions_tell_scorers_apart():
    versions = [
        NumberAnswer().version,
        NumberAnswer("flexible").version,
        BoxedAnswer().version,
        BoxedAnswer(1.0).version,
    ]
    assert len(set(versions)) == 4


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \fbox{3}", "3"),
        (r"\boxed 5$ apples", "5"),
        (r"\boxed 5.", "5"),
        (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\left\{ x \right. }", r"\left\{ x \right."),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
        ("no box", None),
        (r"\boxedish{3}", None),
        (r"\boxed{−3}", "-3"),
    ],
)
def test_the_last_box_with_balanced_braces_is_the_answer(text, content):
    assert boxed(text) == content


SAME = [
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac{1}{2}", "1/2"),
    ("1/2", "0.5"),
    ("0.5", ".5"),
    (r"\dfrac12", r"\tfrac 1 2"),
    (r"\frac{-1}{2}", r"-\frac12"),
    ("-.5", r"-\frac{1}{2}"),
    ("0.25", r"\frac{1}{4}"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"\sqrt\pi", r"\sqrt{\pi}"),
    ("x=5", "5"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"10\%", "10"),
    ("10%", "10"),
    ("(1, 2)", "(1,2)"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    ("1,000", "1000"),
    (r"1,\!000", "1000"),
    (r"11,\! 111,\! 100", "11111100"),
    ("1{,}000", "1000"),
    ("2.0", "2"),
    ("2.", "2"),
    (r"5\text{ cm}", "5"),
    (r"\$5", "5"),
    ("$2n-2$", "2n-2"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_spellings_have_one_normal_form(one, other):
    assert normalise_math(one) == normalise_math(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("3 1/2", "31/2"), ("1,2", "12"), ("(1,200)", "1200"), ("12", "21"), (r"\frac{1}{0}", "0"), ("10", "0.1")],
)
def test_different_answers_keep_different_forms(one, other):
    assert normalise_math(one) != normalise_math(other)


@given(st.text(alphabet=r"\{}()[]$%^=/.,-+0123456789 fracdtsqrtleftrightboxedtext" + "\n", max_size=60))
@settings(max_examples=400, deadline=None)
def test_normal_forms_of_any_text_are_found_without_an_error(text):
    normalise_math(text)
    boxed(text + r"\boxed{" + text)
    strict_number("####" + text)
    flexible_number(text)


@given(st.integers(-(10**6), 10**6), st.integers(1, 1000))
@settings(deadline=None)
def test_a_fraction_in_any_spelling_is_its_lowest_terms(above, below):
    assert normalise_math(f"{above}/{below}") == normalise_math(rf"\frac{{{2 * above}}}{{{2 * below}}}")


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("0.3333333", r"\frac{1}{3}", True),
        ("0.333", r"\frac{1}{3}", False),
        ("3.0000001", "3", True),
        ("3000001", "3000000", False),
        ("0", r"\frac{1}{10000000}", False),
        (r"\frac{10}{20}", r"\frac{1}{2}", True),
    ],
)
def test_decimals_agree_within_a_millionth_and_whole_numbers_exactly(answer, gold, same):
    assert same_math(answer, gold, 1.0) is same


def test_nothing_that_is_decided_before_starts_math_verify(monkeypatch):
    monkeypatch.setattr(answers, "math_verify_agrees", lambda *_: pytest.fail("asked math-verify"))
    assert BoxedAnswer()(r"\boxed{\frac12}", "0.5").correct
    assert not BoxedAnswer()(r"\boxed{3}", "4").correct


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        (r"(x+1)^2", "x^2+2x+1", True),
        (r"\sqrt{200}", r"10\sqrt{2}", True),
        (r"\pi/2", r"\frac{\pi}{2}", True),
        ("[1,2)", "[1,2]", False),
        (r"3\frac12", "7/2", True),
        ("{" * 50, "1", False),
    ],
)
def test_math_verify_decides_what_is_left(answer, gold, same):
    assert same_math(answer, gold, 20.0) is same


def test_a_comparison_without_end_is_wrong_after_its_time_and_the_next_one_works():
    assert same_math("x+x", "2x", 20.0)
    worker = answers._worker(os.getpid())
    before = worker.process.pid
    start = time.monotonic()
    assert not same_math("9^{9^{9^{9}}}", "1", 0.5)
    assert time.monotonic() - start < 5
    assert worker.process is None
    assert same_math("y+y", "2y", 20.0)
    after = worker.process.pid
    assert after != before
    assert same_math("z+z", "2z", 20.0)
    assert worker.process.pid == after


def test_a_worker_that_was_killed_is_replaced():
    assert same_math("u+u", "2u", 20.0)
    worker = answers._worker(os.getpid())
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert same_math("v+v", "2v", 20.0)


def test_a_question_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(answers.MathVerifyWorker, "ask", lambda self, *args: bool(asked.append(args)))
    for _ in range(3):
        same_math("w+w+w", "3 w", 1.0)
    assert len(asked) == 1


def test_model_text_is_never_run_as_python(tmp_path):
    target = tmp_path / "ran"
    for attack in (f"__import__('os').system('touch {target}')", f"open('{target}','w')"):
        assert arithmetic(attack) is None
        assert not same_math(attack, "1", 5.0)
    assert not target.exists()


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", 24),
        ("0.1+0.2", Fraction(3, 10)),
        (".5*10", 5),
        ("-14+-8+1", -21),
        ("-18/-2", 9),
        ("(1+2)*3", 9),
        (" 2 + 2 ", 4),
        ("100/3", Fraction(100, 3)),
        ("7//2+1", 4),
    ],
)
def test_arithmetic_is_exact(expression, value):
    assert arithmetic(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", "1/0", "2**9999", "9**9**9**9", "7///2", "1(2)", "1,2", "x+1", "1e9", "1_000", "(1", "1)", "()", "1=1",
        "0x1", "1.2.3", "True", "1;2", "1\n+1", "(" * 100 + "1" + ")" * 99, "(" * 150, "-" * 300 + "1", "..1",
        "9" * 300,
    ],
)  # fmt: skip
def test_anything_else_than_bounded_arithmetic_has_no_value(expression):
    assert arithmetic(expression) is None


@given(st.text(alphabet="0123456789.+-*/() ", max_size=210))
@settings(max_examples=500, deadline=None)
def test_arithmetic_never_raises_and_stays_small(expression):
    value = arithmetic(expression)
    assert value is None or len(str(value)) < 2_000
