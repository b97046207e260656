"""The LightningModules against the same mathematics written out with bare torch."""

import copy
import functools
from dataclasses import replace

import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

from datamodules.batches import TokenBatch, Trajectory
from datamodules.collation import preference_batch, token_batch, trajectory_batch
from datamodules.math_problems import MathProblems, preference_pairs
from lightning_modules.alignment import policies, soft_q
from lightning_modules.alignment.dqo import DQO
from lightning_modules.alignment.kto import KTO, mismatched
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.sft import RFT, SFT
from lightning_modules.alignment.value import ValueNetwork
from lightning_modules.optimizers.schedules import warmup_constant, warmup_cosine

LR, VALUE_LR, STEPS = 3e-3, 1e-2, 10
EVALUATION = {"k": 2, "temperature": 1.0, "top_p": 1.0, "max_new": 8, "seed": 0, "batch_rows": 64}
ROLLOUTS = {"k": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new": 12, "seed": 1, "batch_rows": 64}


@pytest.fixture(autouse=True)
def generated_problems(monkeypatch):
    """Also where the real ones are at hand."""
    monkeypatch.delenv("TESSERA_DATA", raising=False)


def problems(tmp_path, **changes) -> MathProblems:
    settings = {
        "name": "gsm8k", "path": None, "download": False, "trajectories": None, "limit": None, "val_size": 4,
        "batch_size": 8, "packed": False, "pad_to_multiple": 1, "max_prompt": 200, "max_response": 100,
        "prompt": "{question}\n", "strip_annotations": False,
        "extract": "strict", "process_reward": "none", "process_scale": 0.5, "on_error": "stop", "seed": 1,
        "workers": 0, "cache": str(tmp_path),
        "standin": {"sft": 24, "prompts": 6, "val": 4, "test": 4, "misconception": 0.6, "slip": 0.0},
    }  # fmt: skip
    return MathProblems(**settings | changes)


def small_policy() -> Policy:
    return policies.tiny(width=16, layers=1, heads=2, hidden=16, context=512)


def make(kind, policy=None, **changes):
    settings = {
        "policy": policy or small_policy(),
        "optimizer": functools.partial(torch.optim.AdamW, lr=LR, betas=(0.9, 0.95), weight_decay=0.1),
        "scheduler": functools.partial(warmup_constant, warmup=3),
        "evaluation": EVALUATION,
    }
    if kind is not SFT:
        settings["rollouts"] = ROLLOUTS
    if kind is DQO:
        objective = functools.partial(soft_q.dqo, beta=0.3, lam=0.9)
        settings |= {"objective": objective, "value": "separate", "value_lr": VALUE_LR, "value_warmup": 0.3}
    return kind(**settings | changes)


def fit(method, data, tmp_path, steps=STEPS):
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=0.5, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )  # fmt: skip
    method.train()
    trainer.fit(method, datamodule=data)
    return data.train_dataloader().dataset


@pytest.fixture
def random_outcomes(monkeypatch):
    """Untrained policies get nothing right: let the verdict depend on the length of what they say."""
    from datamodules.answers import NumberAnswer, Score

    monkeypatch.setattr(NumberAnswer, "__call__", lambda self, text, gold: Score("1", len(text) % 2 == 0))
    # a response that is cut off has reward 0: make it end early
    monkeypatch.setattr(Policy, "stop_ids", property(lambda self: list(range(0, len(self.tokenizer), 4))))


def test_one_optimizer_with_two_groups_is_two_optimizers(tmp_path, random_outcomes):
    method = make(DQO)
    reference = copy.deepcopy(method.policy, {id(method.policy.tokenizer): method.policy.tokenizer})
    value = ValueNetwork(reference)
    batches = fit(method, problems(tmp_path), tmp_path)

    warmup = int(0.3 * STEPS)
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    nets = {"policy": (reference, LR, warmup), "value": (value, VALUE_LR, 0)}
    optimizers = {}
    for name, (net, lr, _) in nets.items():
        matrices = [p for p in net.parameters() if p.ndim >= 2]
        vectors = [p for p in net.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizers[name] = torch.optim.AdamW(groups, lr=lr, **options)
    for step in range(STEPS):
        batch = batches[step]
        scores = reference(batch["ids"], batch["mask"])
        losses = soft_q.dqo(scores.log_probs, value(batch["ids"]), batch, beta=0.3, lam=0.9)
        for name, loss in (("value", losses.value), ("policy", losses.policy)):
            net, lr, delay = nets[name]
            optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            for group in optimizers[name].param_groups:
                group["lr"] = lr * warmup_constant(step - delay, STEPS, warmup=3)
            if step >= delay:
                optimizers[name].step()
    assert {outcome for step in range(STEPS) for outcome in batches[step]["outcome"].tolist()} == {0.0, 1.0}
    for mine, theirs in ((method.policy, reference), (method.value, value)):
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_the_policy_does_not_move_while_the_value_warms_up(tmp_path, random_outcomes, value):
    method = make(DQO, value=value, value_warmup=1.0)
    before = {name: p.clone() for name, p in method.named_parameters()}
    fit(method, problems(tmp_path), tmp_path, steps=3)
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not [name for name in moved if name.startswith("policy")]


def test_a_shared_value_trains_the_trunk_after_the_warm_up(tmp_path, random_outcomes):
    def objective(log_probs, values, batch):
        return soft_q.Losses(0 * log_probs.sum(), values.square().mean() - values.mean(), {})

    method = make(DQO, value="shared", value_warmup=0.0, objective=objective)
    torch.nn.init.normal_(method.value.linear.weight)
    before = method.policy.causal_lm.model.layers[0].mlp.up_proj.weight.clone()
    fit(method, problems(tmp_path), tmp_path, steps=2)
    assert not torch.equal(before, method.policy.causal_lm.model.layers[0].mlp.up_proj.weight)


def test_the_kl_term_is_zero_with_zero_gradient_at_the_reference(tmp_path, random_outcomes):
    def objective(log_probs, values, batch):
        return soft_q.Losses(0 * log_probs.sum(), 0 * values.sum(), {})

    policy = small_policy()
    method = make(DQO, policy=policy, kl=1.0, objective=objective, value_warmup=0.0)
    method.make_optimizer = functools.partial(torch.optim.SGD, lr=1.0)
    before = policy.fingerprint()
    fit(method, problems(tmp_path), tmp_path, steps=1)
    moved = max((a - b).abs().max() for a, b in zip(policy.parameters(), method._reference[0].parameters()))
    assert moved < 1e-6
    assert method._reference[0].fingerprint() == before
    assert not [name for name in method.state_dict() if "reference" in name]


def test_kto_runs_and_its_reference_point_is_zero_at_the_start(tmp_path, random_outcomes):
    method = make(KTO, beta=0.3, lambda_desirable=1.0, lambda_undesirable=1.0)
    batches = fit(method, problems(tmp_path), tmp_path, steps=2)
    fresh = make(KTO, beta=0.3, lambda_desirable=1.0, lambda_undesirable=1.0)
    fresh.all_gather = lambda rows: rows
    assert fresh._reference_point(batches[0]).item() == 0


def trajectory(prompt, sample, reward, response=(5, 6, 1)) -> Trajectory:
    response = list(response)
    return Trajectory(
        f"p{prompt}", sample, "q", "1", "", [9] * (2 + prompt), response, True, [-1.0] * len(response),
        [-2.0] * len(response), None, reward,
    )  # fmt: skip


def test_mismatched_pairs_are_every_prompt_with_the_next_rows_response():
    rows = [trajectory(0, 0, 1.0, (5, 1)), trajectory(1, 0, 0.0, (6, 7, 8, 1)), trajectory(2, 0, 0.0, (3, 1))]
    ids, mask = mismatched(trajectory_batch(rows, 0, 1.0))
    assert ids.tolist() == [[9, 9, 6, 7, 8, 1], [9, 9, 9, 3, 1, 0], [9, 9, 9, 9, 5, 1]]
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[1, 2, 3, 4], [2, 3], [3, 4]]


def test_rft_keeps_each_correct_answer_once_and_says_when_there_is_none():
    method = make(RFT)
    rows = [trajectory(0, 0, 1.0), trajectory(0, 1, 1.0), trajectory(0, 2, 0.0), trajectory(1, 0, 1.0)]
    assert method.keep(rows) == [rows[0], rows[3]]
    with pytest.raises(ValueError, match=r"no sampled answer is correct: raise rollouts\.k"):
        method.keep(rows[2:3])


def test_pairs_are_of_one_problem_without_replacement_and_at_most_six():
    rows = [trajectory(0, i, float(i < 9)) for i in range(16)] + [trajectory(1, i, float(i < 2)) for i in range(8)]
    rows = [replace(row, lp_ref=[float(row.sample)] * 3) for row in rows]  # to know it again
    pairs = preference_pairs([*rows, trajectory(2, 0, 1.0)], seed=3)
    assert [pair.prompt_id for pair in pairs] == ["p0"] * 6 + ["p1"] * 2
    samples = [tuple(int(lp[0]) for lp in pair.lp_ref) for pair in pairs]
    assert all(right < 9 <= wrong for right, wrong in samples[:6])
    assert all(right < 2 <= wrong for right, wrong in samples[6:])
    assert len({right for right, _ in samples[:6]}) == 6
    batch = preference_batch(pairs, 0, 1.0)
    assert batch["ids"].shape == (8, 2, 6)
    assert batch["label"].tolist() == [1.0] * 8
    assert batch["lp_ref"][0, 0].tolist() == [0, *pairs[0].lp_ref[0], 0]
    assert "value" not in batch


def test_the_outcome_sits_on_the_last_response_token_beside_the_step_rewards():
    row = trajectory(0, 0, 1.0, (5, 6, 1))
    batch = trajectory_batch([row, trajectory(3, 0, 0.0, (4, 1))], 0, 1.0)
    assert batch["rewards"].tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6]
    assert batch["lp_ref"][1].tolist() == [0, 0, 0, 0, -2, -2]
    shaped = trajectory_batch([replace(row, step_rewards=[0.5, 0.0, -0.25])], 0, 1.0)
    assert shaped["rewards"].tolist() == [[0, 0.5, 0, 0.75]]


def test_the_end_token_is_learned_and_the_prompt_is_not():
    batch = token_batch([([7, 8, 9], [4, 5, 1]), ([7], [1])], 0, 2.0)
    learned = [ids[1:][mask].tolist() for ids, mask in zip(batch["ids"], batch["mask"])]
    assert learned == [[4, 5, 1], [1]]


def test_padding_does_not_change_the_loss():
    policy = small_policy()
    rows = [([7, 8, 9], [4, 5, 1]), ([7], [3, 1])]
    together = policy(**{k: token_batch(rows, 0, 1.0)[k] for k in ("ids", "mask")}).log_probs.sum()
    apart = sum(policy(**{k: token_batch([row], 0, 1.0)[k] for k in ("ids", "mask")}).log_probs.sum() for row in rows)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


class Held:
    """A trainer that holds a method with this tokenizer."""

    def __init__(self, tokenizer):
        self.lightning_module = type("M", (), {"policy": type("P", (), {"tokenizer": tokenizer})})()


def test_a_chat_template_is_applied_once_and_special_tokens_do_not_double(tmp_path):
    policies.tiny().tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=False)
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %} A:"
    data = problems(tmp_path)
    data.trainer = Held(tokenizer)
    ids = data.encode_prompt("Tom has 3 apples.")
    assert ids[0] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "Tom has 3 apples. A:"


def test_the_batch_that_a_method_names_is_the_batch_it_gets(tmp_path):
    data = problems(tmp_path)
    batches = fit(make(SFT), data, tmp_path, steps=1)
    assert set(batches[0]) == TokenBatch.__required_keys__
    tokenizer = data.tokenizer
    row = batches[0]["ids"][0][1:][batches[0]["mask"][0]]
    assert tokenizer.decode(row[:-1]) in {problem.solution for problem in data.parts["sft"]}
    assert row[-1] == tokenizer.eos_token_id


def test_nothing_to_train_is_refused(tmp_path):
    method = make(SFT)
    method.policy.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        method.parameter_groups()


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_step(tmp_path):
    method = make(SFT)
    original = method.training_step

    def poisoned(batch, batch_idx):
        return original(batch, batch_idx) * (float("nan") if method.global_step == 2 else 1.0)

    method.training_step = poisoned
    with pytest.raises(FloatingPointError, match="gradient of policy is nan at step 2"):
        fit(method, problems(tmp_path), tmp_path)


def test_schedules_start_above_zero_and_end_at_their_final_value():
    factors = [warmup_cosine(step, 100, warmup=10, final=0.1) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1)
    assert factors[55] == pytest.approx(0.55)
    assert [warmup_constant(step, 9, warmup=2) for step in range(4)] == [0.5, 1, 1, 1]
