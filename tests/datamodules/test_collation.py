"""Sequences become rows: each token once, each response learned, nothing learned across a boundary."""

import random

import pytest

from datamodules.collation import packed_batch, padded_length, token_batch

ROWS = [([7, 8, 9], [4, 5, 1]), ([7], [3, 1]), ([6, 6], [2, 2, 2, 1])]


def sequences(batch) -> list[tuple[list[int], list[int]]]:
    """(tokens, learned tokens) of every sequence, cut where positions begin anew."""
    found = []
    for ids, mask, positions in zip(batch["ids"].tolist(), batch["mask"].tolist(), batch["positions"].tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0 and ids[i]]
        for begin, end in zip(starts, [*starts[1:], len(ids)]):
            cut = [i for i in range(begin, end) if ids[i]]
            found.append(([ids[i] for i in cut], [ids[i] for i in cut if i and mask[i - 1]]))
    return found


def test_sequences_lie_end_to_end_with_positions_of_their_own():
    batch = packed_batch(ROWS, 0, 3.0, 1, room=15)
    assert batch["ids"].tolist() == [[7, 8, 9, 4, 5, 1, 6, 6, 2, 2, 2, 1, 7, 3, 1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert batch["mask"].nonzero()[:, 1].tolist() == [2, 3, 4, 7, 8, 9, 10, 12, 13]
    assert batch["token_share"] == 3


@pytest.mark.parametrize("room", [1, 30, 70, 10_000])
def test_packing_keeps_every_sequence_and_its_learned_tokens(room):
    generator = random.Random(0)
    draw = lambda least: [generator.randint(1, 99) for _ in range(generator.randint(least, 20))]  # noqa: E731
    rows = [(draw(1), draw(1)) for _ in range(30)]
    batch = packed_batch(rows, 0, 1.0, 1, room)
    assert sorted(sequences(batch)) == sorted((prompt + response, response) for prompt, response in rows)
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    assert batch["ids"].shape[1] <= max(room, longest)


def test_without_a_prompt_the_first_token_is_not_learned_from_the_sequence_before():
    batch = packed_batch([([], [5, 4, 1]), ([], [3, 1])], 0, 1.0, 1, room=8)
    assert batch["ids"][0].tolist() == [5, 4, 1, 3, 1]
    assert batch["mask"][0].tolist() == [True, True, False, True]


def test_what_a_policy_sees_of_a_row_is_a_multiple():
    assert [padded_length(tokens, 8) for tokens in (1, 2, 9, 10)] == [1, 9, 9, 17]
    assert padded_length(13, 1) == 13
    batch = token_batch(ROWS, 0, 1.0, multiple=8)
    assert batch["ids"].shape == (3, 9)
    assert batch["ids"][0].tolist() == [7, 8, 9, 4, 5, 1, 0, 0, 0]
    assert batch["mask"].sum(1).tolist() == [3, 2, 4]
