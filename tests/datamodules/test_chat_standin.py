"""The generated game: its preference is what it says, its Nash policy is the known one, its rows are drawn by it."""

import itertools

import numpy as np
import pytest

from datamodules.batches import Message, Prompt
from datamodules.chat_standin import (
    BEFORE,
    FIRST_TURN,
    LATER_TURNS,
    MALFORMED,
    GamePreference,
    Reply,
    generate,
    payoff,
)
from datamodules.conversations import continued

USER, THEN = "17. Find coins, the pens are lost.", "3. So books are lost, get cards."
SIZES = {"train": 300, "val": 20, "test": 30}
REPLIES = [
    "Tom coins",
    "Ana pens coins",
    "Ben pens",
    "Tom cards books",
    "nothing at all",
    "",
    "Ana",
    "Tom coins coins pens",
]


def prompt(*texts: str) -> Prompt:
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Prompt("p", texts[-1], "", [], messages)


def rows(constants, size=3):
    return np.array([[payoff(constants, i, j) for j in range(size)] for i in range(size)])


def test_the_tables_are_those_of_rps_2():
    cyclic = GamePreference(cyclic=1.0)
    first = [[cyclic.stage(Reply(i, 0), Reply(j, 0), None) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(
        first, 0.5 + 0.5 * np.array([[0, -0.6, 0.4], [0.6, 0, -0.8], [-0.4, 0.8, 0]]), atol=1e-12
    )
    # r_2((s, a), (s', a')) = 1/2 + 1/4 K(.5, .5, 1)[a, a'] + 1/4 K(.4, 0, .8)[s, s']
    later = cyclic.stage(Reply(1, 0), Reply(2, 0), [Reply(2, 0), Reply(1, 0)])
    assert later == pytest.approx(0.5 + 0.25 * -1.0 + 0.25 * 0.8)


def test_no_reply_beats_the_nash_policy_of_two_turns():
    one, two = np.array([1 / 2, 1 / 6, 1 / 3]), np.array([1 / 2, 1 / 4, 1 / 4])
    game = GamePreference(cyclic=1.0)

    def value(a: int, b: int) -> float:
        """Of playing a, then b, against the Nash policy."""
        first = sum(p * game.stage(Reply(a, 0), Reply(i, 0), None) for i, p in enumerate(one))
        pairs = itertools.product(range(3), range(3))
        return first + sum(
            one[i] * two[j] * game.stage(Reply(b, 0), Reply(j, 0), [Reply(a, 0), Reply(i, 0)]) for i, j in pairs
        )

    assert max(value(a, b) for a in range(3) for b in range(3)) == pytest.approx(1.0, abs=1e-12)


def test_every_way_of_comparing_is_antisymmetric():
    mixed = GamePreference(cyclic=0.5)
    asked = prompt(USER, "Tom coins", THEN)
    for first, second in itertools.product(REPLIES, REPLIES):
        assert mixed(asked, first, second) + mixed(asked, second, first) == pytest.approx(1)
    talks = [continued([one, two], [THEN]) for one, two in itertools.product(REPLIES[:6], REPLIES[2:])]
    for first, second in itertools.product(talks, talks):
        assert mixed(prompt(USER), first, second) + mixed(prompt(USER), second, first) == pytest.approx(1)
        assert 0 <= mixed(prompt(USER), first, second) <= 1


def test_without_its_cyclic_part_the_preference_is_bradley_terry_in_what_the_user_asked_for():
    order = GamePreference(cyclic=0.0, strength=2.0)
    assert order(prompt(USER), "Ana coins coins", "Tom pens") == pytest.approx(1 / (1 + np.exp(-2.0 * 3)))
    assert order(prompt(USER, "x", THEN), "Ana coins coins", "Tom pens") == 0.5
    assert order(prompt(THEN), "Ana cards", "Tom books") == pytest.approx(1 / (1 + np.exp(-2.0 * 2)))


def test_a_malformed_reply_loses_for_certain_and_the_turn_after_it_too_in_part():
    game = GamePreference(cyclic=1.0)
    assert game(prompt(USER), "Tom coins", "What?") == 1
    assert game(prompt(USER), "", "What?") == 0.5
    assert game.read(USER, "Tom coins coins coins").name == MALFORMED
    assert game.read(USER, "Tom  coins").name == MALFORMED
    spoilt = continued(["What?", "Tom coins"], [THEN]), continued(["Ben coins", "Tom coins"], [THEN])
    assert game.stages(prompt(USER).messages, *spoilt) == [0.0, 0.25]
    assert game(prompt(USER), *spoilt) == 0.125
    broken = "Tom coins", continued(["Tom coins", "Tom coins"], [THEN])
    assert game.stages(prompt(USER).messages, *broken) == [0.5, 0.0]


def test_a_rest_of_a_conversation_is_judged_turn_by_turn_with_each_sides_own_replies():
    game = GamePreference(cyclic=0.7)
    one, other = ["Tom coins", "Ana cards"], ["Ana pens", "Ana books"]
    first = game(prompt(USER), one[0], other[0])
    second = game.stage(
        game.read(THEN, one[1]), game.read(THEN, other[1]), [game.read(USER, one[0]), game.read(USER, other[0])]
    )
    assert game(prompt(USER), continued(one, [THEN]), continued(other, [THEN])) == pytest.approx((first + second) / 2)
    assert payoff(BEFORE, 0, 1) != 0
    assert second != game(prompt(USER, "Tom coins", THEN), one[1], other[1])


def test_the_classes_are_all_well_formed_replies_by_what_counts_of_them():
    game = GamePreference(things=2)
    classes = game.classes(USER)
    assert sum(len(replies) for replies in classes.values()) == len(set(game.replies())) == 3 * (6 + 36)
    assert {reply.worth for reply in classes} == {-2, -1, 0, 1, 2}
    assert len(classes) == 15
    for reply, texts in classes.items():
        assert {game.read(USER, text) for text in texts} == {reply}


def test_the_cycle_is_one():
    for constants in (FIRST_TURN, LATER_TURNS):
        table = rows(constants)
        assert (table == -table.T).all()
        assert table[0, 2] > 0 > table[0, 1]
        assert table[1, 2] < 0


def test_labels_are_drawn_by_the_preference():
    game = GamePreference(cyclic=0.5, strength=1.5)
    pairs = [row for row in generate({"train": 3000}, 0, 2, game, False)["train"] if row.replies]
    true = np.array([game.stages(row.messages, *row.replies)[0] for row in pairs])
    assert {row.label for row in pairs} == {1.0}
    # the better one is drawn: of the pairs with preference p it comes first with chance p
    odds = np.maximum(true, 1 - true)
    assert abs((true > 0.5).sum() - odds[true != 0.5].sum()) < 4 * np.sqrt((odds * (1 - odds)).sum())


def test_soft_labels_are_the_preference_itself():
    game = GamePreference()
    for row in generate(SIZES, 1, 3, game, True)["train"]:
        if row.replies:
            assert row.label == game.stages(row.messages, *row.replies)[0]


def test_no_conversation_begins_as_another_one_and_the_test_stays_when_the_training_grows():
    game = GamePreference()
    parts, larger = generate(SIZES, 1, 2, game, False), generate({**SIZES, "train": 500}, 1, 2, game, False)
    openings = [row.opening for rows in parts.values() for row in rows if not row.replies]
    assert len(set(openings)) == len(openings) == sum(SIZES.values())
    assert (parts["test"], parts["val"]) == (larger["test"], larger["val"])
    assert parts == generate(SIZES, 1, 2, game, False) != generate(SIZES, 2, 2, game, False)


def test_a_conversation_has_a_pair_after_every_turn_of_the_user():
    for row in generate(SIZES, 1, 3, GamePreference(), False)["val"]:
        roles = [message.role for message in row.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert (len(row.script), len(row.replies)) in ((2, 0), (0, 2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"cyclic": 1.5}, "data.standin.cyclic=1.5"), ({"things": 0}, "count from 1"), ({"train": 10**6}, "lower data")],
)
def test_settings_that_cannot_be_are_refused(changes, reason):
    sizes = {"train": changes.pop("train", 3)}
    with pytest.raises(ValueError, match=reason):
        generate(sizes, 0, 2, GamePreference(**changes), False)


def test_prompts_of_others_are_refused():
    with pytest.raises(ValueError, match="no turn of the stand-in's game"):
        GamePreference()(prompt("What is the time?"), "Tom coins", "Ana coins")


def plays(*by_turn, malformed=0.0):
    """A policy that says each name as often in every conversation of a turn, with things at random."""

    def chances(conversations):
        game = GamePreference()
        found = []
        for said in conversations:
            shares = by_turn[len(said) // 2]
            names = [game.read(said[-1].content, reply).name for reply in game.replies()]
            found.append([(1 - malformed) * shares[name] / names.count(name) for name in names])
        return found

    return chances


THIRDS, NASH = (1 / 3, 1 / 3, 1 / 3), ((1 / 2, 1 / 6, 1 / 3), (1 / 2, 1 / 4, 1 / 4))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (plays(*NASH), 0.0),
        (plays(THIRDS, THIRDS), 0.175),
        (plays((4 / 9, 2 / 9, 1 / 3), NASH[1]), 2 / 45),
        (plays(THIRDS, THIRDS, malformed=1.0), 1.0),
    ],
)
def test_exploitability_of_the_two_turns_is_that_of_rps2(policy, expected):
    found = GamePreference(cyclic=1.0).exploitability(prompt(USER).messages, (THEN,), policy)
    assert found == pytest.approx(expected, abs=1e-12)


def test_who_says_the_wanted_thing_only_cannot_be_exploited_where_things_are_all_that_counts():
    game = GamePreference(cyclic=0.0)

    def best(conversations):
        return [
            [float(reply == "Tom " + " ".join([wanted] * 2)) for reply in game.replies()]
            for wanted in (("coins", "cards")[len(said) // 2] for said in conversations)
        ]

    assert game.exploitability(prompt(USER).messages, (THEN,), best) == pytest.approx(0, abs=1e-12)
    assert game.exploitability(prompt(USER).messages, (), plays(THIRDS)) > 0.2
