"""Rows of every layout become conversations; rows that cannot be used are one sentence, or counted by reason."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from datamodules.batches import Message
from datamodules.conversations import (
    Conversation,
    Defect,
    Ledger,
    Place,
    continued,
    conversations,
    read_conversations,
    turns_of,
)
from datamodules.jsonl import read_jsonl

REAL = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data"))
real = pytest.mark.skipif(not (REAL / "preferences").exists(), reason=f"no real data in {REAL}")
WHERE = Place("rows.jsonl", 7)
ASKED = (Message("user", "a?"), Message("assistant", "b"), Message("user", "c?"))


def one(record: dict) -> Conversation:
    (found,) = conversations(record, "row", WHERE)
    return found


def said(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def shared(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


HISTORY = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant: "
PAIRS = {
    "transcripts": {"chosen": HISTORY + "yes", "rejected": HISTORY + "no"},
    "messages": {"prompt": "a?", "chosen": said("a?", "b", "c?", "yes"), "rejected": said("a?", "b", "c?", "no")},
    "prompt apart": {
        "prompt": said("a?", "b", "c?"),
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "sharegpt": {
        "conversations": shared("a?", "b", "c?"),
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
}


@pytest.mark.parametrize("record", PAIRS.values(), ids=PAIRS.keys())
def test_the_history_is_the_prompt_and_the_last_replies_are_the_pair(record):
    assert one(record) == Conversation("row", ASKED, ("yes", "no"))


def test_a_system_turn_comes_first_and_an_empty_one_is_none():
    record = {
        "conversations": [{"from": "system", "value": ""}, *shared("a?")],
        "chosen": {"from": "gpt", "value": "1"},
    }
    record["rejected"] = {"from": "gpt", "value": "2"}
    assert one(record).messages == (Message("user", "a?"),)
    record["conversations"][0]["value"] = "be brief"
    assert one(record).messages == (Message("system", "be brief"), Message("user", "a?"))
    assert one(record).opening == "a?"


def test_plain_rows_keep_the_subset_of_a_benchmark_and_their_own_id():
    found = one({"prompt": "a?", "chosen": "yes", "rejected": "no", "subset": "hep-cpp", "id": 3})
    assert (found.id, found.subset, found.replies, found.label) == ("3", "hep-cpp", ("yes", "no"), 1.0)


def test_the_rows_of_gpm_spell_it_reject_and_may_say_how_sure_they_are():
    found = one({"instruction": "a?", "chosen": "yes", "reject": "no", "label": 0.75, "margin": 2})
    assert (found.replies, found.label) == (("yes", "no"), 0.75)


def test_the_rows_of_sppo_bring_win_rates_with_the_answer_itself_in_the_mean():
    record = {"chosen": said("a?", "yes"), "rejected": said("a?", "no")}
    record |= {"chosen_probs": 0.9, "chosen_probs_win": 0.7, "chosen_probs_lose": 0.3}
    assert (one(record).label, one(record).value) == (0.9, (0.7, 0.3))


def test_a_dialogue_is_a_script_and_its_last_turn_with_a_reference():
    history = [{"user": "a?", "bot": "b"}, {"user": "c?", "bot": "d"}]
    script, last = conversations({"task": "GR", "id": 1, "history": history}, "row", WHERE)
    assert (script.messages, script.script, script.replies) == (ASKED[:1], ("c?",), ())
    assert (last.messages, last.script, last.replies) == (ASKED, (), ("d",))


def test_questions_are_a_script_and_their_reference_is_not_imitated():
    found = one({"question_id": 81, "turns": ["a?", "c?"], "reference": ["b", "d"]})
    assert (found.id, found.messages, found.script, found.replies, found.gold) == ("81", ASKED[:1], ("c?",), (), "b")


@pytest.mark.parametrize(("votes", "label"), [((1, 1, 2), 1.0), ((2, 2, 2), 0.0), ((0, 0, 1), 0.5), ((0, 1, 2), 0.5)])
def test_the_majority_of_three_people_is_the_label(votes, label):
    record = {"idx": 0, "instruction": "a?", "input": "x", "response_1": "yes", "response_2": "no"}
    found = one(record | {f"annotator_{i}": vote for i, vote in enumerate(votes, start=1)})
    assert (found.label, found.messages[0].content, found.id) == (label, "a?\n\nx", "0")


def test_a_judge_who_says_what_is_shown_first_has_said_nothing():
    record = {"question_id": 1, "turns": ["a?", "c?"], "answer_1_turns": ["yes", "x"], "answer_2_turns": ["no", "y"]}
    verdicts = {"verdict_order_12": "model_1", "verdict_order_21": "model_2"}
    assert one(record | verdicts).label == 0.5
    assert one(record | verdicts | {"verdict_order_21": "tie"}).label == 0.75


DEFECTS = {
    "a response is empty": {"prompt": "a?", "chosen": " ", "rejected": "no"},
    "a response is not text": {"prompt": "a?", "chosen": True, "rejected": "no"},
    "the two responses are the same": {"prompt": "a?", "chosen": "no", "rejected": "no\n"},
    "the two members differ before the last reply": {"chosen": HISTORY + "x", "rejected": HISTORY.replace("b", "B")},
    "the roles are out of order": {"messages": [*said("a?"), *said("c?", "d")]},
    "the turn before the reply is not the user's": {
        "conversations": shared("a?", "b"), "chosen": shared("", "1")[1], "rejected": shared("", "2")[1],
    },
    "there is no turn of the user": {"messages": [{"role": "assistant", "content": "b"}]},
    "the role 'robot' is unknown": {"messages": [{"role": "robot", "content": "b"}]},
    "a turn has neither": {"messages": ["a?"]},
    "a turn is empty": {"turns": ["a?", ""]},
    "a turn of `history` lacks": {"history": [{"user": "a?"}]},
    "field `label` is 1.5, no probability": {"instruction": "a?", "chosen": "yes", "reject": "no", "label": 1.5},
    "field `chosen_probs` is -0.1, no probability": PAIRS["messages"] | {"chosen_probs": -0.1},
    "a verdict is not one of": {
        "verdict_order_12": "error", "verdict_order_21": [], "turns": ["a?"], "answer_1_turns": ["1"],
        "answer_2_turns": ["2"],
    },
    "the reply is labelled false": {"messages": said("a?", "b"), "label": False},
    "a pair has only its chosen": {"prompt": "a?", "chosen": "yes"},
    "a pair has only its response_2": {"prompt": "a?", "response_2": "yes", "label": 1},
    "no known layout": {"question": "a?", "answer": "b"},
}  # fmt: skip


@pytest.mark.parametrize(("reason", "record"), DEFECTS.items(), ids=DEFECTS.keys())
def test_what_is_wrong_is_said_in_a_sentence_with_line_and_remedy(reason, record):
    if "differ" in reason:
        record = record | {"rejected": record["rejected"] + "y"}
    with pytest.raises(Defect, match=r"^rows\.jsonl, line 7.*data\.on_error=skip$") as error:
        conversations(record, "row", WHERE)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_skipped_rows_are_counted_by_reason():
    ledger = Ledger("skip")
    bad = [DEFECTS["a response is empty"], DEFECTS["a response is empty"], DEFECTS["a response is not text"]]
    rows = enumerate([*bad, {"prompt": "a?", "chosen": "yes", "rejected": "no"}], start=1)
    (kept,) = read_conversations(rows, "rows.jsonl", "train", ledger, set())
    assert kept.id == "train-3"
    assert str(ledger) == "2 x a response is empty, 1 x a response is not text"


def test_an_id_that_comes_again_is_made_another_one():
    rows = enumerate([{"id": "x", "prompt": "a?"}] * 3, start=1)
    found = read_conversations(rows, "rows.jsonl", "train", Ledger("stop"), set())
    assert len({each.id for each in found}) == 3


def test_a_continued_conversation_is_taken_apart_again():
    text = continued(["b", "d", "f"], ["c?", "e?"])
    assert turns_of(text) == (["b", "d", "f"], ["c?", "e?"])
    assert turns_of("b") == (["b"], [])


VALUES = (
    None,
    0,
    1.5,
    True,
    "",
    "x",
    [],
    ["x"],
    {},
    {"role": "user"},
    {"role": [], "content": 1},
    [[]],
    [{}],
    "\n\nHuman:",
)


def read_or_refused(row: dict) -> tuple[list[Conversation], str | None]:
    try:
        return conversations(row, "row", WHERE), None
    except ValueError as error:
        return [], str(error)


def test_a_thousand_damaged_rows_are_read_or_refused_in_a_sentence():
    sound = [*PAIRS.values(), *DEFECTS.values(), {"task": "x", "id": 1, "history": [{"user": "a", "bot": "b"}]}]
    sound.append({f"annotator_{i}": 1 for i in (1, 2, 3)} | {"instruction": "a", "response_1": "b", "response_2": "c"})
    sound.append({"prompt": "a?", "response_1": "b", "response_2": "c", "label": 1})
    for seed in range(1000):
        rng = random.Random(seed)
        row = json.loads(json.dumps(rng.choice(sound)))
        place = row
        while isinstance(place, dict | list) and place and rng.random() < 0.5:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list):
                break
            place = place[key]
        if place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place[key] = rng.choice(VALUES)
        found, sentence = read_or_refused(row)
        assert sentence is None or (sentence.startswith("rows.jsonl, line 7") and "\n" not in sentence)
        for each in found:
            roles = [message.role for message in each.messages if message.role != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
            assert all(isinstance(reply, str) and reply.strip() for reply in each.replies)
            assert 0 <= each.label <= 1


# the development files: (conversations, with two replies, counted reasons)
COUNTS = {
    "mt_bench/question": (80, 0, {}),
    "mt_bench_101/mtbench101": (2776, 0, {}),
    "preferences/pandalm_human": (
        796, 796, {"a response is empty": 54, "a response is not text": 6, "a turn is empty": 1},
    ),
    "preferences/llmbar": (349, 349, {}),
    "preferences/mt_bench_human_majority": (160, 160, {}),
    "preferences/mt_bench_phi3_gpt4": (63, 63, {"a verdict is not one of model_1, tie, model_2": 2}),
    "preferences/hh_harmless": (599, 599, {"the two members differ before the last reply": 1}),
    "preferences/dpo_en_demo": (260, 260, {}),
    "preferences/kto_en_demo": (132, 0, {"the reply is labelled false and has no other beside it": 128}),
}  # fmt: skip


@real
@pytest.mark.parametrize("name", COUNTS)
def test_the_rows_of_the_development_files(name):
    ledger, path = Ledger("skip"), REAL / f"{name}.jsonl"
    found = read_conversations(read_jsonl(path), str(path), "train", ledger, set())
    pairs = sum(len(each.replies) == 2 for each in found)
    assert (len(found), pairs, dict(ledger.counts)) == COUNTS[name]


@real
def test_the_judgements_of_the_development_files():
    def labels(name):
        path = REAL / "preferences" / f"{name}.jsonl"
        return Counter(
            each.label for each in read_conversations(read_jsonl(path), name, "train", Ledger("skip"), set())
        )

    assert labels("llmbar") == {1.0: 176, 0.0: 173}
    assert labels("mt_bench_human_majority") == {1.0: 80, 0.0: 80}
    assert labels("mt_bench_phi3_gpt4") == {0.0: 17, 0.25: 3, 0.5: 24, 0.75: 5, 1.0: 14}
    assert labels("pandalm_human") == {1.0: 338, 0.0: 371, 0.5: 87}


@real
def test_the_dialogues_of_mt_bench_101_have_2_to_7_turns():
    path = REAL / "mt_bench_101" / "mtbench101.jsonl"
    found = read_conversations(read_jsonl(path), str(path), "train", Ledger("stop"), set())
    scripts = [each for each in found if not each.replies]
    assert Counter(1 + len(each.script) for each in scripts) == {2: 459, 3: 554, 4: 259, 5: 107, 6: 6, 7: 3}
    assert sum(1 + len(each.script) for each in scripts) == 4208
