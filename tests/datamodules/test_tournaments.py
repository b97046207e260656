"""Symbolic tournaments: what their tables say, and that held-out pairs are new and fair."""

import pytest
import torch

from datamodules.batches import Prompt
from datamodules.tournaments import NAMES, THINGS, Tournament, Tournaments, cycle, dominant, order, skew
from lightning_modules.alignment import policies

SETTINGS = {
    "tournaments": {"cycle": [2, 3], "order": [1, 5], "dominant": [1, 4], "random": [1, 5]}, "strength": 2.0,
    "label": "hard", "pairs": 500, "held_out": 80, "limit": None, "batch_size": 8, "max_prompt": 64,
    "max_response": 64, "seed": 1, "workers": 0, "download": False, "cache": "unused",
}  # fmt: skip


class Trainer:
    """What a datamodule asks of one."""

    def __init__(self):
        policy = policies.tiny(width=16, layers=1, heads=2, hidden=16)
        self.lightning_module = type("M", (), {"policy": policy})()


def tournaments(**changes) -> Tournaments:
    data = Tournaments(**SETTINGS | changes)
    data.trainer = Trainer()
    data.setup("fit")
    return data


def text(data: Tournaments, ids: list[int]) -> str:
    return data.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("table", [cycle(5, 2.0), order(4, 2.0), dominant(4, 2.0), skew(6, 2.0, 0)])
def test_every_table_is_antisymmetric(table):
    assert torch.equal(table, -table.T)


def test_the_tables_are_what_their_names_say():
    assert cycle(3, 1.0).tolist() == [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]
    assert order(3, 1.0).tolist() == [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]]
    assert dominant(4, 1.0)[-1].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("kind", "table", "ceiling"),
    [
        ("cycle", cycle(3, 1.0), 2 / 3),
        ("cycle", cycle(5, 1.0), 4 / 5),
        ("cycle", cycle(20, 1.0), 19 / 20),
        ("order", order(20, 1.0), 1),
        ("dominant", dominant(4, 1.0), 5 / 6),
    ],
)
def test_the_ceiling_of_a_scalar_is_that_of_the_best_order(kind, table, ceiling):
    assert Tournament(kind, 0, table).ceiling == pytest.approx(ceiling)


def test_held_out_pairs_are_of_known_items_in_new_words_and_every_edge_is_among_them():
    data = tournaments()
    said = {
        part: {text(data, response) for pairs in kinds.values() for pair in pairs for response in pair.responses}
        for part, kinds in data.parts.items()
    }
    assert not said["train"] & said["val"] | said["train"] & said["test"] | said["val"] & said["test"]
    assert all(words.split()[0] in NAMES and words.split()[3].rstrip(".") in THINGS for words in said["train"])
    for kind, pairs in data.parts["test"].items():
        wanted = sum(len(t.edges) for t in data.tournaments if t.kind == kind)
        items = {(p.prompt_id, frozenset(text(data, r).split()[2] for r in p.responses)) for p in pairs}
        assert len(items) == wanted


@pytest.mark.parametrize("label", ["hard", "soft", "sampled"])
def test_labels_are_the_truth_or_drawn_from_it(label):
    data = tournaments(label=label, pairs=1000)
    distance, prompts = 0.0, {t.id: t for t in data.tournaments}
    for pair in data._all("train"):
        first, second = (text(data, response) for response in pair.responses)
        truth = data.preference(Prompt(pair.prompt_id, "", "", pair.prompt_ids), first, second)
        assert truth != 0.5
        assert prompts[pair.prompt_id].prompt_ids == pair.prompt_ids
        assert label != "hard" or pair.label == (truth > 0.5)
        assert label != "soft" or pair.label == truth
        assert label != "sampled" or pair.label in (0, 1)
        distance += pair.label - truth
    assert label == "hard" or abs(distance) < 3 * 1000**0.5 / 2
    firsts = [pair.label > 0.5 for pair in data._all("train")]
    assert 0.44 < sum(firsts) / len(firsts) < 0.56


def test_the_same_seed_gives_the_same_pairs_and_another_one_others():
    one, same, other = tournaments(), tournaments(), tournaments(seed=2)
    assert one.parts == same.parts
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.parts != other.parts


def test_a_chat_template_is_applied_once():
    data = tournaments()
    data.tokenizer.chat_template = "<eos>{% for m in messages %}{{ m.content }}{% endfor %} A:"
    data.setup("fit")
    assert data.tokenizer.decode(data.tournaments[0].prompt_ids) == "<eos>Problem 0: What is more? A:"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"label": "firm"}, r"data\.label=firm: there are hard, soft, sampled"),
        ({"strength": 0.0}, r"data\.strength=0"),
        ({"tournaments": {"ring": [1, 3]}}, r"data\.tournaments\.ring: there are cycle, order"),
        ({"tournaments": {"cycle": [1, 2]}}, "from 3 to 100 items"),
        ({"tournaments": {"cycle": []}}, "names no tournament"),
    ],
)
def test_settings_that_make_no_tournament_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tournaments(**SETTINGS | changes)
