"""Step rewards sit on the token that closes a calculator mark."""

import random

import pytest

from datamodules.process_reward import annotation_rewards, is_right


def in_pieces(text: str, size: int) -> tuple[list[int], list[str]]:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    return list(range(len(pieces))), pieces


def rewards_of(text: str, size: int = 1, scale: float = 1.0) -> tuple[list[float], list[str]]:
    ids, pieces = in_pieces(text, size)
    return annotation_rewards(ids, lambda some: "".join(pieces[i] for i in some), scale), pieces


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_each_right_mark_pays_its_share_on_the_token_that_completes_it(size):
    text = "a <<1+2=3>>3 b <<3*2=6>>6\n#### 6"
    rewards, _ = rewards_of(text, size, scale=0.5)
    for mark in ("<<1+2=3>>", "<<3*2=6>>"):
        end = text.index(mark) + len(mark)
        assert rewards[(end - 1) // size] >= 0.25
    assert sum(rewards) == pytest.approx(0.5)


def test_the_first_wrong_mark_costs_the_scale_and_nothing_counts_after_it():
    rewards, _ = rewards_of("<<1+2=3>><<2*2=5>><<1+1=2>>", scale=3.0)
    assert [(i, r) for i, r in enumerate(rewards) if r] == [(8, 1.0), (17, -3.0)]


@pytest.mark.parametrize("text", ["", "no marks #### 5", "<<1+2=3", "1+2=3>>", "<< <3 >"])
def test_a_text_without_a_whole_mark_earns_nothing(text):
    rewards, _ = rewards_of(text)
    assert rewards == [0.0] * len(text)


def test_half_characters_at_the_cut_do_not_move_the_reward():
    data = "€😀 <<1+2=3>>3 😀 <<2*3=6>>6".encode()

    def decode(ids):  # one replacement per byte, as byte-level tokenizers may give: longer than the finished character
        text = bytes(ids)
        whole = text.decode(errors="ignore")
        return whole + "�" * (len(text) - len(whole.encode()))

    rewards = annotation_rewards(list(data), decode, 1.0)
    places = [i for i, r in enumerate(rewards) if r]
    assert [data[: i + 1].endswith(b">>") for i in places] == [True, True]
    assert [rewards[i] for i in places] == [0.5, 0.5]


def test_binary_search_finds_what_a_scan_finds():
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice(["<<1+1=2>>", "<<4/2=2>>", "word ", "\n", "<<2-1=1>>"]) for _ in range(12))
        size = rng.randint(1, 6)
        rewards, pieces = rewards_of(text, size)
        expected, marks, done = [0.0] * len(pieces), text.count(">>"), 0
        for i in range(len(pieces)):
            now = "".join(pieces[: i + 1]).count(">>")
            expected[i], done = (now - done) / max(marks, 1), now
        assert rewards == pytest.approx(expected)


@pytest.mark.parametrize(
    "mark",
    ["48/2=24", "1/3=0.33", "2/3=.67", "2/3=.66", "0.1*3=0.3", "-5+2=-3", "5=5", "20/100*41.472=8.294400000000001"],
)
def test_a_mark_may_round_or_cut_its_last_decimal(mark):
    assert is_right(mark)


@pytest.mark.parametrize(
    "mark",
    [
        "9*3=12", "150+50=201", "2/3=.65", "3000000+1=3000002", "3/4=3/4", "", "=", "5", "=5", "a+b=3", "1+1=two",
        "1/0=0", "2**3=8", "1+1=2=2", "9**9**9=1", "1+1=" + "2" * 10_000,
    ],
)  # fmt: skip
def test_a_mark_that_is_off_or_no_arithmetic_is_wrong(mark):
    assert not is_right(mark)
