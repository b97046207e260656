"""What a step sees depends on the seed alone; a pass covers every window once; evaluation counts every target once."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.shards import Stream
from datamodules.steps import FromStep
from datamodules.windows import SPAN, EvalWindows, Shuffle, TrainWindows

N, T, END = 1_003, 16, 7
COUNTING = Stream([np.arange(400, dtype=np.uint16), np.arange(400, N, dtype=np.uint16)])
DOCUMENTS = Stream([np.where(np.arange(N) % 37 % 11 == 10, END, 100 + np.arange(N) % 90).astype(np.uint16)])


def train(stream=COUNTING, **changes):
    return TrainWindows(stream, **({"context": T, "batch_size": 8, "seed": 3} | changes))


@given(st.integers(1, 3_000), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_shuffle_is_a_permutation_of_any_size(size, seed, epoch):
    assert (np.sort(Shuffle(size, seed, epoch)(np.arange(size))) == np.arange(size)).all()


def test_a_shuffle_looks_like_chance():
    orders = np.stack([Shuffle(1_000, 0, epoch)(np.arange(1_000)) for epoch in range(300)])
    assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 4 / math.sqrt(1_000)
    counts = np.stack([np.histogram(orders[:, place], 10, (0, 1_000))[0] for place in range(50)])
    # each of 500 counts is binomial(300, 0.1): their normalised squares sum up to chi-square with 450 degrees
    assert abs(((counts - 30) ** 2 / 30).sum() - 450) < 4 * math.sqrt(2 * 450)


def test_a_shuffle_of_ten_million_needs_no_more_than_what_is_asked():
    shuffle = Shuffle(10_000_000, 0, 0)
    places = np.array([0, 1, 9_999_999])
    assert (shuffle(places) < 10_000_000).all()
    assert (shuffle(places)[1:] == shuffle(places[1:])).all()


def test_targets_are_the_next_tokens():
    batch = train()[5]
    assert batch["ids"].shape == (8, T + 1)
    assert batch["ids"].dtype == torch.int64
    assert (batch["ids"][:, 1:] == batch["ids"][:, :-1] + 1).all()
    assert batch["mask"].all()
    assert batch["token_share"] == 8 * T
    assert "positions" not in batch


def test_a_pass_covers_every_window_exactly_once():
    data = train(batch_size=1)
    for epoch in (0, 1, 2):
        begins = np.concatenate([data.begins(epoch * data.windows + i) for i in range(data.windows)])
        assert (np.diff(np.sort(begins)) == T).all()
        assert begins.min() < T
        assert begins.max() + T < N
    assert data.windows == len(data) == (N - T) // T


def test_passes_differ_in_order_and_shift():
    data = train(batch_size=61)
    passes = [data.begins(epoch) for epoch in range(20)]
    assert len({int(begins.min()) for begins in passes}) > 5
    assert len({tuple((begins - begins.min()).tolist()) for begins in passes}) == 20


@pytest.mark.parametrize("settings", [{}, {"document_mask": True}, {"align": True}])
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_the_global_batch_is_the_same_on_any_number_of_processes(world, accumulate, settings):
    settings = {"stream": DOCUMENTS, "end": END, **settings}
    whole = train(**settings)
    for step in (0, 7, SPAN, 200):
        parts = [
            train(rank=rank, world=world, accumulate=accumulate, **settings)[step * accumulate + part]
            for part in range(accumulate)
            for rank in range(world)
        ]
        gathered = torch.stack([part["ids"] for part in parts], 1).flatten(0, 1)
        assert (gathered == whole[step]["ids"]).all()
        shares = {float(part["token_share"]) for part in parts}
        assert shares == {float(whole[step]["token_share"]) / (world * accumulate)}
        assert sum(int(part["mask"].sum()) for part in parts) == whole[step]["token_share"]


def test_a_run_that_goes_on_sees_what_it_would_have_seen():
    whole, again = train(accumulate=2), pickle.loads(pickle.dumps(train(accumulate=2)))
    order = list(FromStep(again, lambda: 5))
    assert order[0] == 10
    for micro in order[:20]:
        assert all((whole[micro][key] == again[micro][key]).all() for key in ("ids", "mask", "token_share"))


def test_other_seeds_see_other_windows():
    assert (train(seed=3).begins(0) != train(seed=4).begins(0)).any()


def test_a_stream_of_one_window_is_repeated():
    data = train(Stream([np.arange(T + 1, dtype=np.uint16)]))
    assert len(data) == 1
    assert (data[123]["ids"] == torch.arange(T + 1)).all()


@pytest.mark.parametrize("length", [T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T - 1])
def test_no_window_reaches_beyond_a_short_stream(length):
    data = train(Stream([np.arange(length, dtype=np.uint16)]), batch_size=1)
    begins = [int(data.begins(step)[0]) for step in range(200)]
    assert max(begins) + T < length
    assert min(begins) == 0


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match=r"data\.batch_size=8 .* multiple of 3"):
        train(world=3)


def test_documents_have_positions_of_their_own_and_their_first_token_is_not_asked_for():
    batch = train(DOCUMENTS, end=END, document_mask=True)[0]
    for ids, mask, positions in zip(batch["ids"].tolist(), batch["mask"].tolist(), batch["positions"].tolist()):
        place = 0
        for t, id in enumerate(ids):
            assert positions[t] == place
            place = 0 if id == END else place + 1
        assert mask == [id != END for id in ids[:-1]]
    assert batch["token_share"] == batch["mask"].sum() < 8 * T


def test_aligned_windows_begin_with_a_document_where_they_hold_one():
    aligned, packed = train(DOCUMENTS, end=END, align=True), train(DOCUMENTS)
    begin_with_end = (aligned[0]["ids"][:, 0] == END).tolist()
    holds = (packed[0]["ids"][:, :T] == END).any(1).tolist()
    last = (aligned.begins(0) + T + 1 >= N - T).tolist()
    assert all(begins or not holds or end for begins, holds, end in zip(begin_with_end, holds, last))
    assert sum(begin_with_end) >= 6


@pytest.mark.parametrize("length", [T + 1, T + 2, 100, 4 * T + 1, N])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_evaluation_counts_every_target_exactly_once_on_any_number_of_processes(length, world, rows):
    stream = Stream([np.arange(1, length + 1, dtype=np.uint16)])
    parts = [EvalWindows(stream, T, rows, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    batches = [part[i] for part in parts for i in range(len(part))]
    assert {tuple(batch["ids"].shape) for batch in batches} == {(rows, T + 1)}
    targets = torch.cat([batch["ids"][:, 1:][batch["mask"]] for batch in batches])
    inputs = torch.cat([batch["ids"][:, :-1][batch["mask"]] for batch in batches])
    assert sorted(targets.tolist()) == list(range(2, length + 1))
    assert (targets == inputs + 1).all()
    assert all(batch["token_share"] == max(1, batch["mask"].sum()) for batch in batches)


def test_evaluation_of_documents_leaves_out_their_first_tokens():
    data = EvalWindows(DOCUMENTS, T, 4, end=END, document_mask=True)
    counted = sum(int(data[i]["mask"].sum()) for i in range(len(data)))
    assert counted == N - 1 - int((DOCUMENTS.read(0, N - 1) == END).sum())
    assert (data[0]["positions"][:, 0] == 0).all()
