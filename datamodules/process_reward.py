"""Step rewards read off GSM8K's calculator marks `<<expr=value>>`, on the token that completes each mark."""

import re
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction

from datamodules.answers import NUMERAL, arithmetic

MARK = re.compile(r"<<([^<>]*)>>")
MAX_DECIMALS = 9  # a calculator's last digits are rounding noise: 8.294400000000001


def is_right(mark: str) -> bool:
    """Whether `expr=value` (the inside of a mark) is arithmetic that comes out at the number `value`.

    Exact for whole results; otherwise within one unit of the last decimal written, so rounded or cut both pass.
    """
    expression, _, value = mark.rpartition("=")
    result, value = arithmetic(expression), value.strip()
    if result is None or len(value) > 100 or not NUMERAL.fullmatch(value):
        return False
    decimals = min(len(value.partition(".")[2]), MAX_DECIMALS)
    return abs(result - Fraction(value)) < Fraction(1, 10**decimals)


def annotation_rewards(response_ids: list[int], decode: Callable[[list[int]], str], scale: float) -> list[float]:
    """One reward per token: each right mark earns `scale` / marks, the first wrong one -`scale`, nothing after it.

    Ours, for the process rewards of arXiv 2410.09302, section 4.4. A mark that is no arithmetic counts as wrong.
    `decode` is the tokenizer's; the rewards sit on the token that completes the mark's `>>`.
    """
    rewards = [0.0] * len(response_ids)
    text = decode(response_ids)
    marks = list(MARK.finditer(text))
    token = 0
    for mark in marks:
        token = _completing_token(response_ids, decode, text[: mark.end()], token)
        if not is_right(mark[1]):
            rewards[token] -= scale
            break
        rewards[token] += scale / len(marks)
    return rewards


def _completing_token(ids: list[int], decode: Callable[[list[int]], str], prefix: str, first: int) -> int:
    """The token, from `first` on, with which the decoded text first starts with `prefix`.

    Compared as text, not by length: half a character decodes to any number of replacement characters.
    """
    counts = range(first + 1, len(ids))
    return first + bisect_left(counts, True, key=lambda count: decode(ids[:count]).startswith(prefix))
