"""The datamodule: what each method is given, on any number of processes; what is left out, and how it is said."""

import json
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from datamodules.batches import PreferenceBatch, TokenBatch
from datamodules.chat import Chat
from datamodules.chat_sets import find_conversations, hub_rows
from datamodules.conversations import continued
from lightning_modules.alignment import policies
from tessera.compose import CONF, compose

REAL = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data"))
real = pytest.mark.skipif(not (REAL / "preferences").exists(), reason=f"no real data in {REAL}")
SMALL = {
    "train": 40,
    "val": 6,
    "test": 8,
    "turns": 2,
    "things": 2,
    "cyclic": 0.5,
    "strength": 1.0,
    "soft_labels": False,
}
POLICY = policies.tiny(width=16, layers=1, heads=2, hidden=16, context=2048)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made(key=value, ...)` is the datamodule of conf/data/chat.yaml with these values, of the stand-in by default."""
    monkeypatch.delenv("TESSERA_DATA", raising=False)

    def made(**changes) -> Chat:
        config = OmegaConf.merge(
            {"seed": 1, "output": str(tmp_path / "outputs")}, OmegaConf.load(CONF / "data/chat.yaml")
        )
        settings = {"name": "standin", "template": "plain", "batch_size": 8, "download": False, "standin": SMALL}
        config.data.update(settings | {"max_prompt": 1024, "max_response": 400} | changes)
        chosen = OmegaConf.to_container(config.data, resolve=True)
        return hydra.utils.get_class(chosen.pop("_target_"))(**chosen)

    return made


class Learner:
    """What the datamodule asks of a method: which batch it takes, the reference's numbers, its own pairs."""

    def __init__(self, batch_type: type = PreferenceBatch, labels: bool = False) -> None:
        self.policy, self.batch_type, self.labels, self.prompts = POLICY, batch_type, labels, []

    def with_reference(self, pairs, folder):
        assert pairs, "there is nothing to refer to"
        return pairs

    def iterate(self, prompts, identity, folder):
        self.prompts, self.identity = prompts, identity
        return []


def at(data: Chat, method: Learner, rank: int = 0, world: int = 1, accumulate: int = 1, step: int = 0) -> Chat:
    data.trainer = SimpleNamespace(
        lightning_module=method,
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        global_step=step,
    )
    data.setup("fit")
    return data


def rows_of(path: Path, rows: list) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def said(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def plain(count: int = 40) -> list[dict]:
    return [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(count)]


def text(ids: torch.Tensor) -> str:
    return POLICY.tokenizer.decode(ids, skip_special_tokens=True)


# ---- what methods are given


def test_pairs_are_two_rows_of_one_prompt_whose_replies_alone_are_trained(made):
    data = at(made(), Learner())
    batch = next(iter(data.train_dataloader()))
    end = POLICY.tokenizer.eos_token_id
    for ids, mask in zip(batch["ids"], batch["mask"]):
        prompt = int(mask[0].nonzero()[0]) + 1
        assert torch.equal(ids[0, :prompt], ids[1, :prompt])
        for one, marked in zip(ids, mask):
            reply = one[1:][marked]
            assert text(one[:prompt]).endswith("Answer\n")
            assert (reply == end).sum() == 1
            assert reply[-1] == end
            assert text(reply) in data.preference.replies()
    assert len(data.pairs) == 2 * 40


def test_the_first_reply_of_a_pair_is_the_better_one_and_its_outcome_comes_along(made, tmp_path):
    rows = [
        {"chosen": said(f"{i}?", "yes"), "rejected": said(f"{i}?", "no")}
        | {"chosen_probs": 0.25, "chosen_probs_win": 0.3, "chosen_probs_lose": 0.6}
        for i in range(20)
    ]
    data = at(made(path=rows_of(tmp_path / "rows.jsonl", rows)), Learner())
    batch = next(iter(data.train_dataloader()))
    assert (batch["label"] == 0.75).all()
    torch.testing.assert_close(batch["value"], torch.tensor([[0.6, 0.3]]).expand(8, 2))
    assert {text(torch.tensor(pair.responses[0])) for pair in data.pairs} == {"no"}


def test_the_better_replies_are_what_is_imitated(made, tmp_path):
    rows = [{"prompt": f"{i}?", "response_1": "one", "response_2": "two", "label": 2} for i in range(20)]
    data = at(made(path=rows_of(tmp_path / "rows.jsonl", rows)), Learner(TokenBatch))
    batch = next(iter(data.train_dataloader()))
    assert {text(ids[1:][mask]) for ids, mask in zip(batch["ids"], batch["mask"])} == {"two"}
    assert batch["token_share"] == batch["mask"].sum()


def test_a_game_gets_every_opening_once_with_what_the_user_says_next(made):
    data = at(made(), Learner(labels=True))
    with pytest.raises(ValueError, match="no row to train on"):
        data.train_dataloader()
    prompts = data.method.prompts
    assert len(prompts) == len({prompt.question for prompt in prompts}) == 40
    assert {(len(prompt.messages), len(prompt.script)) for prompt in prompts} == {(1, 1)}
    assert data.method.identity["data"] == data.fingerprint
    assert all(data.encode_messages(prompt.messages) == prompt.ids for prompt in prompts)


def test_the_prompts_of_the_last_turn_have_the_given_replies_before_them(made):
    data = at(made(turns="last"), Learner())
    assert Counter(len(prompt.messages) for prompt in data.val) == {1: 6, 3: 6}
    assert all(not prompt.script for prompt in data.val)


def test_the_true_preference_judges_a_reply_and_a_whole_conversation(made):
    data = at(made(), Learner())
    prompt = data.val[0]
    first, second = (continued([name, name], list(prompt.script)) for name in ("Tom coins", "Ana coins"))
    assert data.preference(prompt, first, second) + data.preference(prompt, second, first) == pytest.approx(1)
    assert made(name="standin").preference == data.preference


def test_evaluation_deals_the_prompts_out_and_shows_everyone_the_held_out_pairs(made):
    loaders = [at(made(), Learner(), rank=rank, world=2).val_dataloader() for rank in (0, 1)]
    dealt = [prompt.id for prompts, _ in loaders for batch in prompts for prompt in batch["prompts"]]
    assert len(dealt) == len(set(dealt)) == 6
    (first, second) = [[batch["ids"] for batch in pairs] for _, pairs in loaders]
    assert sum(len(ids) for ids in first) == 12
    assert all(map(torch.equal, first, second))


def test_held_out_pairs_come_by_subset_where_a_benchmark_has_some(made, tmp_path):
    rows = [row | {"subset": ("hep-cpp", "hep-go")[i % 2], "id": i} for i, row in enumerate(plain())]
    rows[-1] |= {"subset": "hep-java", "chosen": "y" * 500}
    data = at(made(path=rows_of(tmp_path / "test.jsonl", rows)), Learner())
    with pytest.warns(UserWarning, match="1 of 1 test pairs of hep-java left out"):
        loaders = data.test_dataloader()
    assert data.subsets == ("prompts", "hep-cpp", "hep-go", "hep-java")
    assert [sum(len(batch["ids"]) for batch in loader) for loader in loaders[1:]] == [20, 19, 0]


def test_without_pairs_the_held_out_replies_are_shown(made, tmp_path):
    rows = [{"messages": said(f"{i}?", "yes")} for i in range(20)]
    data = at(made(path=rows_of(tmp_path / "rows.jsonl", rows)), Learner(TokenBatch))
    (_, replies) = data.val_dataloader()
    assert sum(len(batch["ids"]) for batch in replies) == 2
    with pytest.raises(ValueError, match="has no pairs to learn from"):
        at(data, Learner()).train_dataloader()


# ---- the same for the same seed


@pytest.mark.parametrize("kind", [TokenBatch, PreferenceBatch])
def test_two_processes_see_the_global_batches_of_one_and_a_resumed_run_goes_on(made, kind):
    whole = at(made(), Learner(kind)).train_dataloader().dataset
    parts = [at(made(), Learner(kind), rank=rank, world=2).train_dataloader().dataset for rank in (0, 1)]
    again = at(made(), Learner(kind), step=3).train_dataloader()
    assert next(iter(again))["ids"].equal(whole[3]["ids"])
    for step in range(2 * len(whole)):
        rows = Counter(_row(ids) for ids in whole[step]["ids"].flatten(0, -2))
        assert rows == Counter(_row(ids) for part in parts for ids in part[step]["ids"].flatten(0, -2))
        shares = [part[step]["token_share"] for part in parts]
        assert shares[0] == shares[1] == whole[step]["token_share"] / 2
    assert made(seed=2).fingerprint != made(seed=1).fingerprint


def _row(ids: torch.Tensor) -> tuple[int, ...]:
    return tuple(token for token in ids.tolist() if token != POLICY.tokenizer.pad_token_id)


# ---- what is left out


def test_what_is_too_long_is_left_out_whole_and_counted_in_one_line(made, tmp_path):
    rows = plain(60)
    for row in rows[:20]:
        row["prompt"] += "x" * 30
    for row in rows[20:30]:
        row["rejected"] = "n" * 30
    data = at(made(path=rows_of(tmp_path / "rows.jsonl", rows), max_prompt=20, max_response=20), Learner())
    with pytest.warns(UserWarning, match="train pairs left out") as said:
        data.train_dataloader()
    (line,) = [str(warning.message) for warning in said if "train pairs" in str(warning.message)]
    train = data.parts["train"]
    long = sum("x" in row.opening for row in train), sum("nn" in row.replies[1] for row in train)
    assert f"{sum(long)} of {len(train)} train pairs left out: " in line
    assert f"{long[0]} x prompt over data.max_prompt=20" in line
    assert f"{long[1]} x response over data.max_response=20" in line
    assert len(data.pairs) == len(train) - sum(long)


def test_a_pair_that_is_too_long_only_for_who_reads_both_at_once_is_left_out_for_them(made, tmp_path):
    rows = plain(60)
    for row in rows[:20]:
        row["rejected"] = "n" * 30
    both = Learner()
    both.length = lambda prompt, answers: POLICY.context + (sum(answers) > 30)
    path = rows_of(tmp_path / "rows.jsonl", rows)
    at(made(path=path), Learner()).train_dataloader()
    data = at(made(path=path), both)
    with pytest.warns(UserWarning, match=f"train pairs left out: .* over the policy's context of {POLICY.context}"):
        data.train_dataloader()
    assert len(data.pairs) == sum("nn" not in row.replies[1] for row in data.parts["train"])


def test_ties_are_left_out_and_counted_or_kept_as_a_half(made, tmp_path):
    rows = [{"prompt": f"{i}?", "response_1": "a", "response_2": "b", "label": i % 2} for i in range(40)]
    path = rows_of(tmp_path / "rows.jsonl", rows)
    kept = at(made(path=path, drop_ties=False), Learner())
    kept.train_dataloader()
    assert Counter(pair.label for pair in kept.pairs).keys() == {0.5, 1.0}
    data = at(made(path=path), Learner())
    with pytest.warns(UserWarning, match=r"train pairs are ties: left out"):
        data.train_dataloader()
    assert {pair.label for pair in data.pairs} == {1.0}


def test_bad_rows_stop_or_are_counted(made, tmp_path, caplog):
    rows = [*plain(), {"prompt": "a?", "chosen": "", "rejected": "no"}, {"prompt": "b?", "chosen": 3, "rejected": "no"}]
    path = rows_of(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 41.*a response is empty.*data\.on_error=skip"):
        made(path=path)
    made(path=path, on_error="skip")
    assert "2 rows left out (data.on_error=skip): 1 x a response is empty, 1 x a response is not text" in caplog.text


def test_a_text_that_spells_the_end_token_stops_with_its_row_or_is_counted(made, tmp_path):
    rows = [row | {"prompt": row["prompt"] + "<eos>"} if i == 3 else row for i, row in enumerate(plain())]
    path = rows_of(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"row train-3: the text spells the special token <eos>"):
        at(made(path=path), Learner()).train_dataloader()
    with pytest.warns(UserWarning, match="1 x the text spells the special token <eos>"):
        at(made(path=path, on_error="skip"), Learner()).train_dataloader()


def test_lengths_beyond_the_context_are_refused(made):
    with pytest.raises(ValueError, match="exceed the policy's context of 2048"):
        at(made(max_prompt=2000, max_response=100), Learner())


# ---- where it is found, and how it is split


def test_the_stand_in_says_that_it_is_one(made, caplog):
    data = made(name="ultrafeedback")
    assert (data.name, data.standin) == ("chat-standin", True)
    assert "no ultrafeedback found" in caplog.text
    assert len(caplog.records) == 1


def test_real_rows_come_before_the_stand_in(made, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    rows_of(tmp_path / "set" / "pairs.jsonl", plain())
    rows_of(tmp_path / "alone.jsonl", plain())
    monkeypatch.setenv("TESSERA_DATA", str(tmp_path))
    assert [made(name=name).name for name in ("set", "alone", "set/pairs")] == ["set", "alone", "set-pairs"]
    assert not made(name="set").standin
    assert made(name="set").preference is None
    rows_of(tmp_path / "set" / "others.jsonl", plain())
    with pytest.raises(FileNotFoundError, match=r"neither train nor test files but others\.jsonl, pairs\.jsonl"):
        made(name="set")
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*nowhere does not exist"):
        made(path=str(tmp_path / "nowhere"))


def test_no_opening_is_in_two_parts_and_the_tests_own_are_not_learned(made, tmp_path):
    rows = [row | {"prompt": f"{i // 3}?"} for i, row in enumerate(plain(90))]
    parts = made(path=rows_of(tmp_path / "rows.jsonl", rows)).parts
    openings = {part: {row.opening for row in found} for part, found in parts.items()}
    assert {part: len(found) for part, found in openings.items()} == {"train": 24, "val": 3, "test": 3}
    assert len(set.union(*openings.values())) == 30
    rows_of(tmp_path / "train.jsonl", rows)
    rows_of(tmp_path / "test.jsonl", rows[:6])
    (tmp_path / "rows.jsonl").unlink()
    parts = made(path=str(tmp_path)).parts
    assert len(parts["test"]) == 6
    assert not {"0?", "1?"} & {row.opening for row in parts["train"] + parts["val"]}
    assert len({row.id for found in parts.values() for row in found}) == 90


def test_the_limit_counts_conversations_that_begin_differently(made):
    parts = made(limit=3).parts
    assert {part: len({row.opening for row in rows}) for part, rows in parts.items()} == dict.fromkeys(parts, 3)
    assert {part: len(rows) for part, rows in parts.items()} == dict.fromkeys(parts, 9)


def test_settings_that_cannot_be_are_refused(made):
    for changes, reason in (
        ({"turns": "first"}, "data.turns=first: there are script, last"),
        ({"held_out": 1.0}, "data.held_out=1.0"),
        ({"on_error": "pass"}, "data.on_error='pass'"),
        ({"standin": {**SMALL, "sft": 3}}, "data.standin has no setting sft"),
    ):
        with pytest.raises(ValueError, match=reason):
            made(**changes)


def test_splits_of_the_hub_are_found_by_their_names(tmp_path):
    for name in ("train_prefs", "train_sft", "test_prefs"):
        rows_of(tmp_path / f"{name}.jsonl", plain(4))
    # a folder stands for a set of the hub: `datasets` reads both alike
    card = "configs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - {{split: {name}, path: {name}.jsonl}}\n" for name in ("train_prefs", "train_sft", "test_prefs")
    )
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    assert {split: len(rows) for split, rows in hub_rows(str(tmp_path)).items()} == {"train": 4, "test": 4}
    with pytest.raises(ValueError, match=r"cannot be read from the hub.*data\.download=false"):
        hub_rows(str(tmp_path / "nowhere"))


def test_the_tiny_policy_reads_chat_in_the_plain_template():
    assert compose(["model=sft", "data=chat"])[0].data.template == "plain"
    assert compose(["model=sft", "data=chat", "policy=smollm2"])[0].data.template is None


# ---- the development files


@real
def test_dialogues_of_mt_bench_101_are_scripts_to_answer_and_references_to_imitate(made, monkeypatch):
    monkeypatch.setenv("TESSERA_DATA", str(REAL))
    data = at(made(name="mt_bench_101", limit=60), Learner(TokenBatch))
    assert all(prompt.script and len(prompt.messages) == 1 for prompt in data.val + data.test)
    batch = next(iter(data.train_dataloader()))
    replies = {row.replies[0] for row in data.parts["train"] if row.replies}
    assert all(text(ids[1:][mask]) in replies for ids, mask in zip(batch["ids"], batch["mask"]))
    last = at(made(name="mt_bench_101", limit=60, turns="last"), Learner())
    assert all(prompt.gold and prompt.messages[-1].role == "user" for prompt in last.val)


@real
@pytest.mark.parametrize("name", ["hh_harmless", "dpo_en_demo", "llmbar", "mt_bench_human_majority", "pandalm_human"])
def test_the_prompt_begins_both_members_of_every_pair_of_the_development_files(made, monkeypatch, name):
    monkeypatch.setenv("TESSERA_DATA", str(REAL))
    data = at(made(name=f"preferences/{name}", on_error="skip", limit=25), Learner())
    data.train_dataloader()
    rows = {row.id: row for row in data.parts["train"]}
    assert data.pairs
    for pair in random.Random(0).sample(data.pairs, min(len(data.pairs), 20)):
        row = rows[pair.prompt_id]
        for reply, wanted in zip(pair.responses, row.replies if row.label >= 0.5 else row.replies[::-1]):
            assert POLICY.tokenizer.decode(reply) == wanted + "<eos>"
            said = "".join(message.content for message in row.messages)
            written = POLICY.tokenizer.decode(pair.prompt_ids)
            for mark in ("Question\n", "Answer\n", "<eos>", "\n\n"):
                written, said = written.replace(mark, ""), said.replace(mark, "")
            assert written == said


@real
def test_the_splits_of_the_development_files_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("TESSERA_DATA", str(REAL))
    sizes = {
        name: tuple(len(rows) for rows in find_conversations(name, on_error="skip", seed=1).parts.values())
        for name in ("mt_bench", "mt_bench_101", "preferences/pandalm_human")
    }
    assert sizes == {
        "mt_bench": (64, 8, 8),
        "mt_bench_101": (2226, 278, 272),
        "preferences/pandalm_human": (649, 74, 73),
    }
