"""Rollouts are sampled once, scored, kept whole, and the same after any interruption."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.batches import Prompt
from lightning_modules.alignment.generation import Sampling, generate
from lightning_modules.alignment.policies import tiny
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.rollout import _short, monte_carlo_rewards, rollout, score_responses

SAMPLING = Sampling(max_new=24)
IDENTITY = {"scorer": "even-1", "template": "plain"}
K = 3


@dataclass
class Verdict:
    extracted: str | None
    correct: bool


def score(response: str, gold: str) -> Verdict:
    """Right when the response has an even number of characters: random weights reach that."""
    return Verdict(str(len(response)) if len(response) > 3 else None, len(response) % 2 == 0)


def make_policy(seed: int = 0) -> Policy:
    """Random weights that end a response after some fifteen tokens."""
    policy = tiny(seed=seed)
    head = policy.causal_lm.lm_head
    with torch.no_grad():
        head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(100 + seed))
        head.weight[1] = 0
    bias = torch.zeros(head.out_features)
    bias[1] = 6.7
    head.bias = torch.nn.Parameter(bias)
    return policy


def make_prompts(count: int = 24) -> list[Prompt]:
    tokenizer, texts = tiny().tokenizer, [f"Tom has {n} apples." + " Ana has 5." * (n % 4) for n in range(count)]
    return [Prompt(f"train-{n}", text, str(n), tokenizer.encode(text)) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy()


def fill(policy: Policy, folder: Path, prompts=None, scorer=score, **kwargs):
    options = {"identity": IDENTITY, "batch_rows": 12, **kwargs}
    sampling = options.pop("sampling", SAMPLING)
    return rollout(policy, prompts or make_prompts(), K, sampling, scorer, folder, **options)


def only(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"*/{name}")
    return path


def data(folder: Path) -> bytes:
    return only(folder, "trajectories.jsonl").read_bytes()


def in_threads(world: int, work) -> list:
    """`work(rank, barrier)` on each of `world` ranks at once."""
    barrier, results = threading.Barrier(world, timeout=60), [None] * world

    def run(rank: int) -> None:
        results[rank] = work(rank, barrier.wait)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_prompt_gets_k_scored_responses_in_order(policy, tmp_path):
    prompts = make_prompts()
    rows = fill(policy, tmp_path)
    assert [(row.prompt_id, row.sample) for row in rows] == [(p.id, s) for p in prompts for s in range(K)]
    for row, prompt in zip(rows, [prompt for prompt in prompts for _ in range(K)]):
        assert (row.question, row.gold, row.prompt_ids) == (prompt.question, prompt.gold, prompt.ids)
        assert len(row.lp_mu) == len(row.lp_ref) == len(row.response_ids)
        assert row.finished == (row.response_ids[-1] == 1)
        assert row.response == policy.tokenizer.decode(row.response_ids[: -1 if row.finished else None])
        verdict = score(row.response, row.gold)
        assert row.extracted == verdict.extracted
        assert row.reward == float(row.finished and verdict.correct)


def test_an_unfinished_response_has_reward_zero(policy, tmp_path):
    rows = fill(policy, tmp_path, scorer=lambda response, gold: Verdict("1", True))
    assert {row.finished for row in rows} == {True, False}
    assert all(row.reward == row.finished for row in rows)


def test_plain_sampling_stores_the_log_probs_of_the_training_forward(policy, tmp_path):
    rows = fill(policy, tmp_path)
    samples = dict(generate(policy, [p.ids for p in make_prompts()], K, SAMPLING, [p.id for p in make_prompts()]))
    for row in rows:
        with torch.no_grad():
            logits = policy.model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0]
        taken = logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1].gather(1, torch.tensor(row.response_ids)[:, None])
        torch.testing.assert_close(torch.tensor(row.lp_mu), taken[:, 0], rtol=0, atol=1e-4)
        assert row.lp_ref == row.lp_mu
        sampled = samples[int(row.prompt_id.split("-")[1])][row.sample]
        assert sampled.ids == row.response_ids
        np.testing.assert_allclose(sampled.log_probs, row.lp_mu, rtol=0, atol=1e-4)


def test_truncated_sampling_keeps_the_samplers_log_probs(policy, tmp_path):
    rows = fill(policy, tmp_path, sampling=replace(SAMPLING, temperature=0.8, top_k=10))
    own = score_responses(policy, [(row.prompt_ids, row.response_ids) for row in rows])
    np.testing.assert_allclose(np.concatenate([row.lp_ref for row in rows]), np.concatenate(own), rtol=0, atol=1e-5)
    assert np.mean([sum(row.lp_mu) > sum(row.lp_ref) for row in rows]) > 0.9


def test_log_probs_survive_the_file_as_float32():
    values = -torch.rand(10_000, generator=torch.Generator().manual_seed(0)).square() * 30
    text = json.dumps(_short(values.tolist()))
    assert np.array_equal(np.float32(json.loads(text)), values.numpy())
    assert len(text) < 0.7 * len(json.dumps(values.tolist()))


def test_another_reference_gives_its_own_log_probs(policy, tmp_path):
    other = make_policy(seed=1)
    rows = fill(policy, tmp_path, reference=other)
    expected = score_responses(other, [(row.prompt_ids, row.response_ids) for row in rows])
    np.testing.assert_allclose(np.concatenate([row.lp_ref for row in rows]), np.concatenate(expected), atol=1e-5)
    assert rows[0].lp_ref != rows[0].lp_mu


def test_a_finished_cache_is_read_and_not_sampled_again(policy, tmp_path):
    first = fill(policy, tmp_path)
    assert fill(policy, tmp_path, scorer=lambda response, gold: 1 / 0) == first


def test_one_seed_twice_is_byte_identical(policy, tmp_path):
    fill(policy, tmp_path / "a")
    fill(policy, tmp_path / "b")
    assert data(tmp_path / "a") == data(tmp_path / "b")


def test_what_decides_the_content_decides_the_key(policy, tmp_path):
    prompts = make_prompts(4)
    variants = [
        {},
        {"sampling": replace(SAMPLING, temperature=0.9)},
        {"sampling": replace(SAMPLING, seed=1)},
        {"identity": {**IDENTITY, "template": "other"}},
        {"policy": make_policy(seed=1)},
        {"reference": make_policy(seed=1)},
        {"prompts": [replace(prompts[0], gold="7"), *prompts[1:]]},
    ]
    for count, variant in enumerate(variants, 1):
        fill(**{"policy": policy, "folder": tmp_path, "prompts": prompts, **variant})
        assert len(list(tmp_path.iterdir())) == count
    fill(policy, tmp_path, prompts, sampling=replace(SAMPLING, temperature=1), batch_rows=6)
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_ranks_share_the_work_and_all_see_the_result(policy, tmp_path):
    expected = fill(policy, tmp_path / "one")

    def work(rank, barrier):
        return fill(policy, tmp_path / "three", rank=rank, world=3, barrier=barrier)

    assert in_threads(3, work) == [expected] * 3
    assert data(tmp_path / "three") == data(tmp_path / "one")
    assert not list(tmp_path.glob("three/*/part-*"))


def test_several_processes_need_a_barrier(policy, tmp_path):
    with pytest.raises(ValueError, match="2 processes needs a barrier"):
        fill(policy, tmp_path, world=2)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.alignment.test_rollout import fill, make_policy, score

calls = 0

def deadly(response, gold):
    global calls
    calls += 1
    if calls > 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(response, gold)

fill(make_policy(), Path(sys.argv[1]), scorer=deadly)
"""


def test_a_killed_rollout_resumes_on_other_ranks_byte_identically(policy, tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    part = only(tmp_path / "killed", "part-0.jsonl")
    finished = sum(len(json.loads(line)) for line in part.read_text().split("\n")[:-1])
    assert finished == 36  # whole batches of twelve
    with part.open("a") as file:
        file.write('[{"prompt_id": "train-9", "sam')  # a line cut by the kill

    scored = []

    def counting(response, gold):
        scored.append(response)
        return score(response, gold)

    def work(rank, barrier):
        return fill(policy, tmp_path / "killed", scorer=counting, rank=rank, world=2, barrier=barrier)

    resumed = in_threads(2, work)
    assert len(scored) == 24 * K - finished
    assert resumed[0] == resumed[1] == fill(policy, tmp_path / "whole")
    assert data(tmp_path / "killed") == data(tmp_path / "whole")


def test_a_kill_between_data_and_manifest_is_finished_later(policy, tmp_path, monkeypatch):
    module = sys.modules[rollout.__module__]
    replace_file = module._replace

    def cut(path, content):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        replace_file(path, content)

    monkeypatch.setattr(module, "_replace", cut)
    with pytest.raises(KeyboardInterrupt):
        fill(policy, tmp_path)
    monkeypatch.setattr(module, "_replace", replace_file)
    assert len(fill(policy, tmp_path, scorer=lambda response, gold: 1 / 0)) == 24 * K


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw.replace(b"apples", b"apple", 1), None])
def test_a_damaged_cache_is_refused(policy, tmp_path, damage):
    prompts = make_prompts(4)
    fill(policy, tmp_path, prompts)
    path = only(tmp_path, "trajectories.jsonl")
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(ValueError, match="does not match the checksum"):
        fill(policy, tmp_path, prompts)


def test_a_damaged_part_is_named(policy, tmp_path):
    fill(policy, tmp_path)
    folder = only(tmp_path, "manifest.json").parent
    (folder / "manifest.json").unlink()
    (folder / "part-4.jsonl").write_text("[]\n\0\0\0\n[]\n")
    with pytest.raises(ValueError, match=r"part-4.jsonl, line 2 is damaged"):
        fill(policy, tmp_path)


def test_the_manifest_says_what_is_inside(policy, tmp_path):
    rows = fill(policy, tmp_path)
    manifest = json.loads(only(tmp_path, "manifest.json").read_text())
    rewards = np.array([row.reward for row in rows]).reshape(-1, K)
    assert manifest["responses"] == len(rows) == manifest["prompts"] * manifest["k"]
    assert manifest["mean_reward"] == pytest.approx(rewards.mean())
    assert manifest["all_right"] == pytest.approx((rewards.sum(1) == K).mean())
    assert manifest["all_wrong"] == pytest.approx((rewards.sum(1) == 0).mean())
    assert manifest["finished"] == pytest.approx(np.mean([row.finished for row in rows]))
    assert manifest["sampling"] == asdict(SAMPLING)
    assert manifest["identity"] == IDENTITY
    assert {"python", "torch", "transformers"} <= manifest["versions"].keys()


@pytest.mark.parametrize(
    ("verdict", "warning"),
    [(Verdict("1", False), "Mean reward 0.00 %"), (Verdict(None, True), "Only 0.0 % of the responses")],
)
def test_rewards_that_teach_nothing_are_announced(policy, tmp_path, caplog, verdict, warning):
    fill(policy, tmp_path, make_prompts(4), scorer=lambda response, gold: verdict)
    assert warning in caplog.text


def test_two_prompts_with_one_id_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="Two prompts have the id 'train-0'"):
        fill(policy, tmp_path, make_prompts(2) + make_prompts(1))


def test_monte_carlo_rewards_stand_on_step_ends_and_telescope(policy, tmp_path):
    rows = fill(policy, tmp_path, make_prompts(6))
    newline = policy.tokenizer.encode("\n")
    rows = [replace(row, response_ids=row.response_ids[:2] + newline + row.response_ids[2:]) for row in rows]
    k, sampling = 8, Sampling(max_new=12, seed=5)
    rewards = monte_carlo_rewards(policy, rows, k, sampling, score)
    keys = [f"{row.prompt_id}/{row.sample}/0" for row in rows]
    starts = dict(generate(policy, [row.prompt_ids for row in rows], k, sampling, keys))
    for position, (row, values) in enumerate(zip(rows, rewards)):
        ends = [n for n, token in enumerate(row.response_ids) if "\n" in policy.tokenizer.decode([token])]
        assert len(values) == len(row.response_ids)
        assert {n for n, value in enumerate(values) if value} <= {*ends, len(values) - 1}
        texts = [policy.tokenizer.decode(sample.ids[:-1]) for sample in starts[position] if sample.finished]
        potential = sum(score(text, row.gold).correct for text in texts) / k
        assert sum(values) == pytest.approx(-potential)
    assert len({value for values in rewards for value in values}) > 3
