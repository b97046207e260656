"""Final answers of word and competition problems: taking them out of a text, and deciding whether two agree.

Text written by a model is never evaluated: arithmetic is read by a parser bounded in size, and symbolic comparison runs
in a process of its own that is killed when it takes too long.
"""

import ast
import atexit
import functools
import json
import operator
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata

MAX_NUMBER, MAX_EXPRESSION, MAX_ANSWER = 100, 200, 2_000  # characters; bounds both time and memory of exact arithmetic
WORKER_START = 120.0  # seconds; importing sympy takes two on an idle machine
RELATIVE_TOLERANCE = Fraction(1, 10**6)

# what people and models type for a minus and a space; texts stay as they are, only extraction sees this
CHARACTERS = str.maketrans(
    dict.fromkeys("−–—‒﹣－", "-")
    | dict.fromkeys("\u00a0\u2007\u2009\u202f\u2028", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
)
NUMERAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
HASHED = re.compile(r"####\s*(?P<sign>[-+]?)\s*\$?\s*(?P<inner>-?)(?P<digits>[0-9.,]*[0-9][0-9.,]*)", re.ASCII)
LAST_NUMBER = re.compile(r"(?P<sign>(?<![\w)])-)?\$?(?P<digits>\d+(?:\.\d+)?|\.\d+)", re.ASCII)
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")


@dataclass(frozen=True)
class Score:
    """What was taken for the answer (None when there was none), and whether it is right."""

    extracted: str | None
    correct: bool


# ---- taking the answer out of a text


def strict_number(text: str) -> str | None:
    """The number after the first `####` that has one, without `$`, thousands commas and a trailing full stop."""
    match = HASHED.search(text.translate(CHARACTERS))
    if match is None:
        return None
    return plain_number(match["sign"] + match["inner"] + match["digits"].rstrip(".,"))


def flexible_number(text: str) -> str | None:
    """The last number in the text; a hyphen after a word or number is a dash or a minus between, not a sign."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.translate(CHARACTERS))
    last = None
    for last in LAST_NUMBER.finditer(text):  # noqa: B007 - the last one is wanted, without keeping them all
        pass
    return None if last is None else (last["sign"] or "") + last["digits"]


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` with braces balanced, or of a brace-less `\boxed 5`.

    None when there is no box, or when the last one is empty or never closed.
    """
    text = text.translate(CHARACTERS)
    last = None
    for last in BOX.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    start = re.compile(r"\s*").match(text, last.end()).end()
    content = _balanced(text, start) if text.startswith("{", start) else _first_word(text, start)
    return content.strip() or None


def _balanced(text: str, start: int) -> str:
    """What stands between the brace at `start` and its partner; escaped braces are letters. Empty if never closed."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()]
    return ""


def _first_word(text: str, start: int) -> str:
    return re.compile(r"[^\s$]*").match(text, start)[0].rstrip(".,;")


# ---- numbers


def plain_number(text: str) -> str | None:
    """The numeral without `$`, thousands commas and a plus sign, or None when the text is no number."""
    text = text.translate(CHARACTERS).replace(",", "").replace("$", "").strip()
    return text.lstrip("+") if len(text) <= MAX_NUMBER and NUMERAL.fullmatch(text) else None


def number(text: str | None) -> Fraction | None:
    """The exact value of a numeral, or None."""
    plain = None if text is None else plain_number(text)
    return None if plain is None else Fraction(plain)


OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),  # in two marks of GSM8K
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def arithmetic(expression: str) -> Fraction | None:
    """The exact value of digits, `+ - * / //` and brackets, or None when it is anything else, too long or divides by 0.

    There is no power: the length of the text bounds the length of the result.
    """
    if len(expression) > MAX_EXPRESSION or not re.fullmatch(r"[0-9.+\-*/() ]+", expression):
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # MemoryError is how the parser reports brackets nested too deeply


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.BinOp():
            return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](_value(node.operand))
        case ast.Constant(value=int() | float()):
            return Fraction(str(node.value))  # through the shortest decimal, so that 0.1 is a tenth
    raise ValueError("not arithmetic")


# ---- MATH's normal form

MATH_RULES = [(re.compile(pattern, re.DOTALL | re.ASCII), replacement) for pattern, replacement in (
    (r"(?<=\d)(?:,?\\!|\{,\}|\\,)\s*(?=\d{3}(?!\d))", ","),  # ours: 1{,}000, 1,\!000 and 1\,000 are 1,000
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),
    (r"tfrac|dfrac", "frac"),
    (r"\\(?:left|right)(?![a-zA-Z])", ""),
    (r"\^(?:\{\\circ\}|\\circ)", ""),
    (r"\\?\$", ""),  # ours: the bare sign too, OlympiadBench keeps it around its answers
    (r"^((?:(?!\\text\{ ).)*)\\text\{ (?:(?!\\text\{ ).)*$", r"\1"),  # units
    (r"\\?%", ""),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"^[^=]{0,2}=([^=]*)$", r"\1"),
    (r"^\s+|\s+$", ""),
    (r"\\sqrt\s*(\\[a-zA-Z]+|[^\s{\[\\])", r"\\sqrt{\1}"),
    (r"(?<!\d) +| +(?!\d)", ""),  # ours: a space between digits stays, or 3 1/2 would be 31/2
    (r"\\frac\s*([^{\\\s])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\})\s*([^{\\\s])", r"\1{\2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
)]  # fmt: skip
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", re.ASCII)
FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", re.ASCII)


def normalise_math(answer: str) -> str:
    r"""The answer in MATH's normal form (hendrycks/math, math_equivalence.py), with every number in lowest terms.

    Differs from there on purpose: 1,000 is 1000, 2.0 is 2, every decimal is a fraction (there only 0.5), a number of
    several spellings has one form (`\frac{2}{4}` is `\frac{1}{2}`), and nothing raises.
    """
    for pattern, replacement in MATH_RULES:
        answer = pattern.sub(replacement, answer)
    if THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    value = _math_number(answer)
    return answer if value is None else _lowest_terms(value)


def _math_number(normal: str) -> Fraction | None:
    """The value of an integer, decimal or `\frac` of integers in normal form, else None."""
    if len(normal) > MAX_NUMBER:
        return None
    if match := FRACTION.fullmatch(normal):
        sign, above, below = -1 if match[1] else 1, int(match[2]), int(match[3])
        return sign * Fraction(above, below) if below else None
    return Fraction(normal) if NUMERAL.fullmatch(normal) else None


def _lowest_terms(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


# ---- do two answers agree?


def same_math(answer: str, gold: str, timeout: float) -> bool:
    """Equal in normal form, else equal as numbers, else equal for math-verify within `timeout` seconds.

    Decimals agree within a relative 1e-6 of the gold answer. Two integers or fractions must be the same number: at that
    tolerance 3,000,001 would be 3,000,000.
    """
    mine, theirs = normalise_math(answer), normalise_math(gold)
    if mine == theirs:
        return mine != ""
    a, b = _math_number(mine), _math_number(theirs)
    if a is None or b is None:
        return math_verify_agrees(gold, answer, timeout)
    written_as_decimal = "." in answer.rstrip(".") or "." in gold.rstrip(".")
    return written_as_decimal and abs(a - b) <= RELATIVE_TOLERANCE * abs(b)


@functools.lru_cache(maxsize=100_000)
def math_verify_agrees(gold: str, answer: str, timeout: float) -> bool:
    """Whether math-verify finds the two LaTeX answers equal; False when it fails, is unsure or takes too long.

    The comparison is not symmetric: gold comes first.
    """
    if max(len(gold), len(answer)) > MAX_ANSWER:
        return False
    return _worker(os.getpid()).ask(gold, answer, timeout)


class MathVerifyWorker:
    """A child process that answers one comparison at a time, started when first asked and after it had to be killed."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, gold: str, answer: str, timeout: float) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            verdict = self._exchange(json.dumps([gold, answer, timeout]), timeout)
            if verdict is None:
                self.stop()
            return verdict == b"True\n"

    def start(self):
        self.stop()
        # -P: the folder of this file must not shadow installed packages
        command = [sys.executable, "-P", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        if self._exchange(json.dumps(["1", "1", WORKER_START]), WORKER_START) != b"True\n":
            self.stop()
            raise RuntimeError("math-verify does not start: `pip install 'math-verify[antlr4_9_3]'`")

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _exchange(self, request: str, timeout: float) -> bytes | None:
        """The worker's line, or None when it died or did not answer in time."""
        try:
            self.process.stdin.write(request.encode() + b"\n")
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        return (self.process.stdout.readline() or None) if ready else None


@functools.cache
def _worker(pid: int) -> MathVerifyWorker:
    """The worker of this process; keyed by its id, because a forked child must not share the parent's pipes."""
    return MathVerifyWorker()


def serve():
    """Answer [gold, answer, timeout] lines from standard input until it closes; this is the child process."""
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))  # sympy can eat memory
    # LaTeX only: math-verify reads other text with sympy's parse_expr, which evaluates it as Python
    latex = functools.partial(parse, extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    for line in sys.stdin:
        gold, answer, timeout = json.loads(line)
        signal.alarm(int(timeout) + 2)  # unhandled, it ends this process: nobody else would, were the parent killed
        try:
            sides = [latex("$" + side.replace("$", "") + "$", fallback_mode="no_fallback") for side in (gold, answer)]
            agrees = bool(verify(*sides, timeout_seconds=None))
        except (Exception, RecursionError):
            agrees = False
        signal.alarm(0)
        print(agrees, flush=True)


# ---- scorers


class NumberAnswer:
    """Right when the number given is the gold number, as exact fractions: 72, 72.0 and 72. are one answer.

    `extract` is "strict" (after `####`, as GSM8K's solutions end) or "flexible" (the last number of the text).
    """

    def __init__(self, extract: str = "strict"):
        extractors = {"strict": strict_number, "flexible": flexible_number}
        if extract not in extractors:
            raise ValueError(f"extract must be one of {', '.join(extractors)}, got {extract!r}: set data.extract")
        self.extract = extractors[extract]
        self.version = f"number-{extract}-1"

    def __call__(self, response: str, gold: str) -> Score:
        wanted = number(gold)
        if wanted is None:
            raise ValueError(f"gold answer {gold!r} is not a number: use answer_format=boxed for symbolic answers")
        extracted = self.extract(response)
        return Score(extracted, extracted is not None and number(extracted) == wanted)

    def canonical(self, extracted: str) -> str:
        """One spelling per number, for majority votes."""
        value = number(extracted)
        return extracted if value is None else str(value)


class BoxedAnswer:
    r"""Right when the last `\boxed{...}` is the gold answer: see `same_math`. `timeout` in seconds."""

    def __init__(self, timeout: float = 5.0):
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be positive and finite, got {timeout}: set data.reward.timeout")
        self.timeout = float(timeout)
        self.version = f"boxed-1-{timeout:g}s-math-verify-{metadata.version('math-verify')}"

    def __call__(self, response: str, gold: str) -> Score:
        extracted = boxed(response)
        return Score(extracted, extracted is not None and same_math(extracted, gold, self.timeout))

    def canonical(self, extracted: str) -> str:
        """One spelling per answer, for majority votes."""
        return normalise_math(extracted)


if __name__ == "__main__":
    serve()
