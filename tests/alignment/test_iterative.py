"""The outer loop of preference games: what is sampled when, what is learned from it, and that nothing happens twice."""

import functools
import json
from pathlib import Path

import lightning as L
import pytest
import torch

from datamodules.math_problems import MathProblems
from lightning_modules.alignment import pairwise, policies
from lightning_modules.alignment.apo import APO
from lightning_modules.alignment.generation import Sampling, generate
from lightning_modules.alignment.iterative import Iterative, with_weights
from lightning_modules.alignment.logit_extrapolation import extrapolated
from lightning_modules.alignment.oracle import Oracle, Verifier
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.rollout import score_responses
from lightning_modules.optimizers.schedules import warmup_constant
from tessera.saving import Newest
from tessera.stopping import Stop

ITERATIONS, EACH = 3, 4
STEPS = ITERATIONS * EACH
DPO = functools.partial(pairwise.dpo, beta=0.1)
SPPO = functools.partial(pairwise.sppo, beta=0.1)
GPO = functools.partial(pairwise.gpo, beta=1.0)
LOSSES = {"dpo": DPO, "sppo": SPPO, "gpo": GPO}


class Shorter(Oracle):
    """The answer with fewer letters a and e is better, by Bradley-Terry."""

    asked = 0

    def compare(self, prompts, first, second):
        for row, texts in enumerate(zip(first, second)):
            Shorter.asked += 1
            one, other = (sum(map(text.count, "ae")) - len(text) / 9 for text in texts)
            yield row, torch.sigmoid(torch.tensor(other - one)).item()


@pytest.fixture(autouse=True)
def generated_problems(monkeypatch):
    monkeypatch.delenv("TESSERA_DATA", raising=False)
    # untrained policies hardly ever end: every fourth token does
    monkeypatch.setattr(Policy, "stop_ids", property(lambda self: list(range(0, len(self.tokenizer), 4))))
    Shorter.asked = 0


def problems(tmp_path) -> MathProblems:
    return MathProblems(
        name="gsm8k", path=None, download=False, trajectories=None, limit=None, val_size=4, batch_size=4, packed=False,
        pad_to_multiple=1, max_prompt=200, max_response=100, prompt="{question}\n", strip_annotations=False,
        extract="strict", process_reward="none", process_scale=0.5, on_error="stop", seed=1, workers=0,
        cache=str(tmp_path / "rollouts"),
        standin={"sft": 4, "prompts": 6, "val": 3, "test": 2, "misconception": 0.6, "slip": 0.0},
    )  # fmt: skip


def settings(**changes):
    return {
        "policy": policies.tiny(width=16, layers=1, heads=2, hidden=16, context=512),
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        "scheduler": functools.partial(warmup_constant, warmup=2),
        "evaluation": {"k": 2, "temperature": 1.0, "top_p": 1.0, "max_new": 8, "seed": 0, "batch_rows": 64},
        "rollouts": {
            "k": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new": 12, "seed": 1, "batch_rows": 8,
        },
        "loss": DPO, "oracle": Shorter(), "iterations": ITERATIONS, "reference": "previous", "ema": 0.5,
        "pairs": "best_worst", "label": "hard", "winrate": "raw", "value": "win_rate", "restart_optimizer": True,
    } | changes  # fmt: skip


def momentum(**changes):
    return APO(**settings(**{"alpha": 0.3, "mode": "weights", "control": "none"} | changes))


class Watch(L.Callback):
    """What every step saw, and the weights before and after it."""

    def __init__(self):
        self.batches, self.weights, self.rates = {}, {}, {}

    def on_train_batch_start(self, trainer, method, batch, batch_idx):
        self.batches[trainer.global_step] = batch
        self.weights[trainer.global_step] = {n: p.detach().clone() for n, p in method.policy.named_parameters()}
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


def play(method, tmp_path, until=None, resume=None, validated=0):
    """Train to the end, or leave with a checkpoint of step `until`; (trainer, what was watched)."""
    data, watch, stop = problems(tmp_path), Watch(), Stop()
    folder = tmp_path / "run" / "checkpoints"

    class Leave(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == until:
                raise KeyboardInterrupt

    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path / "run", use_distributed_sampler=False,
        callbacks=[watch, Newest(folder, 3, 0, stop), Leave()], num_sanity_val_steps=0,
        limit_val_batches=None if validated else 0, val_check_interval=validated or None,
        check_val_every_n_epoch=None if validated else 1,
    )  # fmt: skip
    method.meet(data)
    method.train()
    try:
        trainer.fit(method, datamodule=data, ckpt_path=resume, weights_only=True)
    except (SystemExit, KeyboardInterrupt):
        assert until is not None
    return trainer, watch


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.policy.parameters(), other.policy.parameters()))


def checkpoint(tmp_path, step):
    """The policy's weights in the checkpoint of a step."""
    saved = torch.load(tmp_path / f"run/checkpoints/step-{step:06d}.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("policy."): tensor for name, tensor in saved.items()}


def lines(tmp_path):
    """How many answers and how many labels were ever written."""
    answers = sum(path.read_text().count("\n") for path in tmp_path.rglob("trajectories.jsonl"))
    labels = [json.loads(line)[0] for path in tmp_path.rglob("labels-*.jsonl") for line in path.open()]
    assert len(labels) == len(set(labels))
    return answers, len(labels)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_iteration_refers_to_the_weights_that_it_begins_with(tmp_path, loss):
    method = Iterative(**settings(loss=LOSSES[loss], value="score" if loss == "gpo" else "win_rate"))
    _, watch = play(method, tmp_path)
    assert sorted(watch.batches) == list(range(STEPS))
    for step, batch in watch.batches.items():
        answering = with_weights(method.policy, watch.weights[step // EACH * EACH])
        expected = answering(batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1)).log_probs
        torch.testing.assert_close(batch["lp_ref"].flatten(0, 1), expected, rtol=0, atol=2e-6)
    assert lines(tmp_path)[0] == 5 * 2 + ITERATIONS * 6 * 3


def test_pairs_have_the_oracles_best_and_worst_answer_with_their_win_rates(tmp_path):
    method, oracle = Iterative(**settings()), Shorter()
    trainer, _ = play(method, tmp_path)
    data = trainer.datamodule
    decode = functools.partial(method.policy.tokenizer.decode, skip_special_tokens=False)
    prompts = {prompt.id: prompt for prompt in data._prompts("prompts")}
    for pair in data.pairs:
        texts = [decode(response[:-1]) for response in pair.responses if response[-1] % 4 == 0]
        if len(texts) == 2:
            assert oracle.prefer([prompts[pair.prompt_id]], *([text] for text in texts)).item() > 0.5
        assert 1 >= pair.value[0] > pair.value[1] >= 0
        assert pair.label == 1.0


def test_moments_and_schedule_begin_anew_in_every_iteration_or_go_on(tmp_path):
    _, watch = play(Iterative(**settings()), tmp_path / "anew")
    assert [watch.rates[step] for step in range(STEPS)] == [5e-3, 1e-2, 1e-2, 1e-2] * ITERATIONS
    trainer, watch = play(Iterative(**settings(restart_optimizer=False)), tmp_path / "on")
    assert [watch.rates[step] for step in range(STEPS)] == [5e-3] + [1e-2] * (STEPS - 1)
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {STEPS}


@pytest.mark.parametrize("until", [2, 4, 6])
@pytest.mark.parametrize("make", [lambda: Iterative(**settings()), momentum], ids=["iterative", "apo"])
def test_a_run_that_goes_on_samples_and_asks_nothing_twice_and_ends_with_the_same_weights(tmp_path, make, until):
    whole = make()
    play(whole, tmp_path / "whole")
    asked, Shorter.asked = Shorter.asked, 0
    play(make(), tmp_path / "parts", until=until)
    newest = max((tmp_path / "parts/run/checkpoints").glob("step-*.ckpt"), default=None)
    again = make()
    _, watch = play(again, tmp_path / "parts", resume=newest)
    assert newest is None or min(watch.batches) == int(newest.stem[-6:])
    assert same(whole, again)
    assert Shorter.asked == asked
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.parametrize("reference", ["initial", "ema"])
def test_other_references(tmp_path, reference):
    method = Iterative(**settings(reference=reference))
    _, watch = play(method, tmp_path / "whole")
    begins = [watch.weights[number * EACH] for number in range(ITERATIONS)]
    mean = {n: 0.5 * (0.5 * begins[0][n] + 0.5 * begins[1][n]) + 0.5 * begins[2][n] for n in begins[0]}
    referred = with_weights(method.policy, begins[0] if reference == "initial" else mean)
    batch = watch.batches[STEPS - 1]
    expected = referred(batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1)).log_probs
    torch.testing.assert_close(batch["lp_ref"].flatten(0, 1), expected, rtol=0, atol=2e-6)
    play(Iterative(**settings(reference=reference)), tmp_path / "parts", until=10)
    again = Iterative(**settings(reference=reference))
    play(again, tmp_path / "parts", resume=max((tmp_path / "parts/run/checkpoints").glob("step-*.ckpt")))
    assert same(method, again)


def test_no_momentum_is_iterative_dpo_bit_for_bit(tmp_path):
    plain = Iterative(**settings())
    play(plain, tmp_path / "plain")
    for mode in ("weights", "logits"):
        method = momentum(alpha=0.0, mode=mode)
        play(method, tmp_path / mode)
        assert same(plain, method)
    control = momentum(control="beta_rescaled")
    play(control, tmp_path / "control")
    rescaled = Iterative(**settings(loss=functools.partial(pairwise.dpo, beta=0.07)))
    play(rescaled, tmp_path / "rescaled")
    assert same(control, rescaled)
    assert not same(control, plain)


def test_momentum_moves_the_weights_that_answer_and_leaves_those_that_were_fitted(tmp_path):
    method = momentum()
    _, watch = play(method, tmp_path)
    fitted = [watch.weights[0], *(checkpoint(tmp_path, number * EACH) for number in (1, 2, 3))]
    for number in (1, 2):
        for name, tensor in watch.weights[number * EACH].items():
            expected = fitted[number][name] + 0.3 * (fitted[number][name] - fitted[number - 1][name])
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
    assert all(torch.equal(fitted[3][name], p) for name, p in method.policy.named_parameters())


def test_reference_only_refers_beyond_the_policy_that_answers(tmp_path):
    method = momentum(mode="reference_only")
    _, watch = play(method, tmp_path)
    now, before = watch.weights[2 * EACH], watch.weights[EACH]
    batch = watch.batches[STEPS - 1]
    rows = batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1)
    logs = [with_weights(method.policy, weights)(*rows).log_probs for weights in (now, before)]
    expected = 1.3 * logs[0] - 0.3 * logs[1]
    torch.testing.assert_close(batch["lp_ref"].flatten(0, 1), expected, rtol=0, atol=5e-6)


def test_extrapolated_logits_are_those_of_two_models_also_while_sampling():
    fitted, previous = (
        policies.tiny(width=16, layers=2, heads=2, hidden=16, context=128, seed=seed) for seed in (1, 2)
    )
    alpha = 0.6
    both = extrapolated(fitted, previous, alpha)
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 19, dtype=torch.bool)
    logits = [policy(ids, mask, logits=True).logits for policy in (fitted, previous)]
    expected = ((1 + alpha) * logits[0] - alpha * logits[1]).log_softmax(-1)
    found = both(ids, mask).log_probs.flatten()
    torch.testing.assert_close(found, expected.gather(1, ids[:, 1:].reshape(-1, 1))[:, 0], rtol=0, atol=1e-5)
    prompts, sampling = [[5, 6, 7], [9, 8, 7, 6, 5, 4]], Sampling(max_new=10, seed=3)
    for position, samples in generate(both, prompts, 3, sampling):
        rows = [(prompts[position], sample.ids) for sample in samples]
        for sample, log_probs in zip(samples, score_responses(both, rows)):
            assert sample.log_probs == pytest.approx(log_probs, abs=1e-4)


def test_logits_mode_answers_from_the_extrapolated_softmax_and_learns_on_from_the_fit(tmp_path):
    method = momentum(mode="logits")
    _, watch = play(method, tmp_path)
    fitted, previous = (with_weights(method.policy, watch.weights[n * EACH]) for n in (2, 1))
    batch = watch.batches[STEPS - 1]
    expected = extrapolated(fitted, previous, 0.3)(batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1)).log_probs
    torch.testing.assert_close(batch["lp_ref"].flatten(0, 1), expected, rtol=0, atol=5e-6)


def test_the_win_rate_against_the_start_comes_with_an_interval_and_with_drift(tmp_path):
    method = Iterative(**settings())
    trainer, _ = play(method, tmp_path, validated=EACH)
    found = {name.removeprefix("val-standin/"): value for name, value in trainer.callback_metrics.items()}
    assert 0 <= found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"] <= 1
    assert found["length_growth"] > 0
    assert found["kl_from_start"].abs() > 0
    trainer.test(method, datamodule=trainer.datamodule, verbose=False)
    rows = [json.loads(line) for line in Path(trainer.default_root_dir, "samples.jsonl").read_text().splitlines()]
    mean = sum(row["p_win"] for row in rows) / len(rows)
    assert trainer.callback_metrics["test-standin/win_rate"].item() == pytest.approx(mean, abs=1e-6)


def test_a_test_alone_finds_the_win_rate_of_the_run_that_left_the_checkpoint(tmp_path):
    trainer, _ = play(method := Iterative(**settings()), tmp_path)
    trainer.test(method, datamodule=trainer.datamodule, verbose=False)
    other, data = Iterative(**settings()), problems(tmp_path)
    other.meet(data)
    alone = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    path = tmp_path / f"run/checkpoints/step-{STEPS:06d}.ckpt"
    alone.test(other, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    for name in ("test-standin/win_rate", "test-standin/kl_from_start"):
        assert alone.callback_metrics[name] == trainer.callback_metrics[name]
    assert alone.callback_metrics["test-standin/kl_from_start"].abs() > 0


def test_a_policy_that_does_not_move_wins_as_often_as_it_loses(tmp_path):
    still = functools.partial(torch.optim.SGD, lr=0.0)
    method = Iterative(**settings(optimizer=still, evaluation=settings()["evaluation"] | {"k": 40}))
    trainer, _ = play(method, tmp_path)
    trainer.test(method, datamodule=trainer.datamodule, verbose=False)
    found = trainer.callback_metrics
    assert found["test-standin/win_rate"] == pytest.approx(0.5, abs=0.06)
    assert found["test-standin/kl_from_start"].abs() < 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pairs": "most"}, r"model\.pairs=most: there are best_worst, all, random"),
        ({"reference": "now"}, r"model\.reference=now: there are previous, initial, ema"),
        ({"ema": 1.0}, r"model\.ema=1\.0 must be in"),
        ({"iterations": 0}, r"model\.iterations=0 must be positive"),
        ({"rollouts": {"k": 1}}, r"rollouts\.k=1: a pair needs two answers"),
        ({"alpha": 1.0}, r"model\.alpha=1\.0: the momentum must be below 1"),
        ({"mode": "both"}, r"model\.mode=both: there are weights, logits, reference_only"),
        ({"control": "beta"}, r"model\.control=beta: there are none, beta_rescaled"),
        ({"mode": "reference_only", "loss": SPPO}, "reference_only: this loss regresses each log-ratio by itself"),
        ({"reference": "initial"}, "momentum is away from the previous"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sampled(changes, said):
    with pytest.raises(ValueError, match=said):
        momentum(**changes)


def test_momentum_of_an_adapters_weights_is_refused():
    pytest.importorskip("peft")
    policy = policies.tiny(width=16, layers=1, heads=2, hidden=16, context=64)
    policy = Policy(policies._with_lora(policy.model, {"r": 2, "alpha": 2}), policy.tokenizer)
    with pytest.raises(ValueError, match="an extrapolated adapter"):
        momentum(policy=policy)
    momentum(policy=policy, mode="reference_only")


def test_steps_that_do_not_divide_into_iterations_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps=12 is no multiple of model\.iterations=5"):
        play(Iterative(**settings(iterations=5)), tmp_path)


def test_an_oracle_that_prefers_nothing_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="iteration 1: the oracle prefers no answer to another one"):
        play(Iterative(**settings(oracle=Verifier())), tmp_path)
