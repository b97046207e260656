"""The method of pairs against the same mathematics written out with bare torch, its reference and its evaluation."""

import copy
import functools
import inspect
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from datamodules.batches import Pair
from datamodules.collation import preference_batch
from lightning_modules.alignment import pairwise
from lightning_modules.alignment.policies import pretrained, tiny
from lightning_modules.alignment.preference import Preference
from lightning_modules.alignment.reply_evaluation import ReplyEvaluation
from lightning_modules.alignment.rollout import score_responses
from lightning_modules.alignment.sft import SFT
from lightning_modules.optimizers.schedules import warmup_constant
from tests.alignment.test_methods import (  # noqa: F401
    fit,
    generated_problems,
    make,
    problems,
    random_outcomes,
    small_policy,
)
from tests.parity import ANSWERS, curve, residuals, train

DPO = functools.partial(pairwise.dpo, beta=0.1)


def method(loss=DPO, policy=None) -> Preference:
    return make(Preference, policy, loss=loss)


def pairs(count: int = 6, label: float = 1.0) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(2, 500, (n,), generator=generator).tolist()  # noqa: E731
    return [Pair(f"p{i}", draw(3 + i % 3), (draw(2 + i), draw(9 - i)), label) for i in range(count)]


def held(one: Preference | SFT, step: int = 0, scorer=None) -> Preference | SFT:
    """The method in the hands of a trainer that is at that step, one process."""
    one.trainer = SimpleNamespace(
        global_step=step, global_rank=0, strategy=SingleDeviceStrategy("cpu"), world_size=1,
        datamodule=SimpleNamespace(scorer=scorer, standin=False, pairs=[], test=[]),
    )  # fmt: skip
    return one


def test_a_run_is_adamw_on_the_loss_of_two_rows_a_pair(tmp_path, random_outcomes):  # noqa: F811
    one = method()
    policy = copy.deepcopy(one.policy, {id(one.policy.tokenizer): one.policy.tokenizer})
    reference = policy.frozen()
    data = problems(tmp_path)
    batches = fit(one, data, tmp_path, steps=6)
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(6):
        batch = batches[step]
        rows = batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1)
        log_ratios = (policy(*rows).log_probs - reference(*rows).log_probs).sum(1)
        loss = -torch.nn.functional.logsigmoid(0.1 * (log_ratios[0::2] - log_ratios[1::2])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warmup_constant(step, 6, warmup=3)
        optimizer.step()
    for (name, mine), theirs in zip(one.policy.named_parameters(), policy.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-6, msg=name)


def test_at_the_reference_all_rewards_are_zero_and_the_lengths_are_those_of_the_responses(tmp_path):
    one = held(method())
    one.setup("fit")
    batch = preference_batch(one.with_reference(pairs(), tmp_path), 0, 1.0)
    compared = one.compare(batch)
    assert compared.log_ratios.abs().max() < 1e-5
    assert compared.lengths.tolist() == [[2 + i, 9 - i] for i in range(6)]
    report = one.report(compared, batch["label"])
    assert report["lengths/chosen"] == 4.5
    assert report["rewards/accuracy"] == pytest.approx(0.5, abs=0.5)
    assert abs(report["kl"]) < 1e-6


def test_better_and_worse_are_told_from_the_label():
    one = method()
    batch = preference_batch([Pair("p", [3], ([4, 5], [6, 7, 8]), label, lp_ref=([0.0] * 2, [0.0] * 3))
                              for label in (1.0, 0.2, 0.5)], 0, 1.0)  # fmt: skip
    compared = one.compare(batch)
    first, second = compared.log_probs[0]
    report = one.report(compared, batch["label"])
    assert report["logps/chosen"] == pytest.approx(((first + second + first) / 3).item())
    assert report["lengths/rejected"] == pytest.approx((3 + 2 + 3) / 3)
    # the same pair the other way round is wrong as often as right, and a tie counts half
    assert report["rewards/accuracy"] == pytest.approx(0.5)
    assert report["rewards/margin"] == pytest.approx(0, abs=1e-6)


def test_the_reference_is_computed_once_and_after_the_policy_has_moved_only_read(tmp_path):
    one = held(method())
    one.setup("fit")
    filled = one.with_reference(pairs(), tmp_path)
    rows = [(pair.prompt_ids, response) for pair in pairs() for response in pair.responses]
    assert [lp for pair in filled for lp in pair.lp_ref] == [
        pytest.approx(lp) for lp in score_responses(one.policy, rows)
    ]
    with torch.no_grad():
        one.policy.causal_lm.lm_head.weight.mul_(2)
    later = held(method(policy=one.policy), step=3)
    later.started_from = one.started_from
    assert later.with_reference(pairs(), tmp_path) == filled
    with pytest.raises(FileNotFoundError, match="is gone, and this run learns with it"):
        later.with_reference(pairs(5), tmp_path)


def test_a_checkpoint_knows_which_weights_its_run_started_from(tmp_path):
    one, checkpoint = held(method()), {}
    one.setup("fit")
    filled = one.with_reference(pairs(), tmp_path)
    one.on_save_checkpoint(checkpoint)
    other = held(method(policy=tiny(width=16, layers=1, heads=2, hidden=16, context=512, seed=9)))
    other.setup("test")
    assert other.started_from != one.started_from
    other.on_load_checkpoint(checkpoint)
    assert other.with_reference(pairs(), tmp_path) == filled
    with pytest.raises(FileNotFoundError):
        other.with_reference(pairs(5), tmp_path)


def test_the_reference_of_an_adapter_is_the_policy_without_it(tmp_path):
    pytest.importorskip("peft")
    small_policy().export(tmp_path / "base")
    policy = pretrained(str(tmp_path / "base"), lora={"r": 4, "alpha": 8})
    one = held(method(policy=policy))
    one.setup("fit")
    filled = one.with_reference(pairs(), tmp_path)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    rows = [(pair.prompt_ids, response) for pair in pairs() for response in pair.responses]
    without = score_responses(policy.frozen(), rows)
    assert [lp for pair in filled for lp in pair.lp_ref] == [pytest.approx(lp) for lp in without]
    assert score_responses(policy, rows)[0] != pytest.approx(without[0], abs=1e-3)


def test_a_loss_of_outcomes_needs_data_that_has_them(tmp_path):
    one = held(method(functools.partial(pairwise.sppo, beta=1e-3)))
    one.setup("fit")
    batch = preference_batch(one.with_reference(pairs(), tmp_path), 0, 1.0)
    with pytest.raises(ValueError, match=r"needs the outcomes of both responses \(`value`\)"):
        one.training_step(batch, 0)


def test_hyperparameters_without_a_sense_are_refused_before_anything_is_sampled():
    with pytest.raises(ValueError, match=r"beta must be positive, but is 0\.0; change model\.loss\.beta"):
        method(functools.partial(pairwise.dpo, beta=0.0))


def test_every_loss_is_given_what_it_asks_for_and_its_beta_scales_the_rewards():
    losses = [f for _, f in inspect.getmembers(pairwise, inspect.isfunction) if f.__module__ == pairwise.__name__]
    losses = [f for f in losses if "beta" in inspect.signature(f).parameters and not f.__name__.startswith("_")]
    assert len(losses) == 9
    for loss in losses:
        one = method(functools.partial(loss, beta=0.25))
        assert one.beta == 0.25


class Talk(L.LightningDataModule):
    """Data whose answers cannot be checked."""

    scorer = None


def test_without_a_scorer_the_headline_is_of_held_out_pairs(tmp_path):
    for make_one, expected in ((lambda: make(SFT), ("val/loss", "min")), (method, ("val/pair_accuracy", "max"))):
        talking, solving = make_one(), make_one()
        talking.meet(Talk())
        solving.meet(problems(tmp_path))
        assert (talking.headline, solving.headline) == (expected, ("val/greedy", "max"))


def evaluated(one: Preference | SFT, rows: list[Pair]) -> dict[str, float]:
    one.evaluation, one.looked_at = ReplyEvaluation(one, 0), []
    for i in range(0, len(rows), 4):
        one.judge(preference_batch(rows[i : i + 4], 0, 1.0))
    return {name: float(value) for name, value in one.evaluation.results("val").items()}


def test_held_out_pairs_are_right_where_the_margin_has_the_sign_of_the_label(tmp_path):
    one = held(method())
    one.setup("fit")
    filled = one.with_reference(pairs(), tmp_path)
    with torch.no_grad():
        one.policy.causal_lm.lm_head.weight.add_(0.1 * torch.randn(one.policy.causal_lm.lm_head.weight.shape))
        margins = [
            r[0] - r[1] for i in range(6) for r in one.compare(preference_batch(filled[i : i + 1], 0, 1.0)).log_ratios
        ]
    found = evaluated(one, filled)
    assert found["pair_accuracy"] == pytest.approx(sum(float(m > 0) for m in margins) / 6)
    assert found["margin"] == pytest.approx(0.1 * sum(m.item() for m in margins) / 6, abs=1e-5)
    losses = [-torch.nn.functional.logsigmoid(0.1 * m).item() for m in margins]
    assert found["loss"] == pytest.approx(sum(losses) / 6, abs=1e-6)
    assert set(one.figures()) == {"preferences"}


def test_sft_is_evaluated_by_the_cross_entropy_of_the_better_replies():
    one = held(make(SFT))
    rows = [*pairs(3), *pairs(2, label=0.1)]
    found = evaluated(one, rows)
    better = [(pair.prompt_ids, pair.responses[int(pair.label < 0.5)]) for pair in rows]
    values = [value for row in score_responses(one.policy, better) for value in row]
    assert found == {"loss": pytest.approx(-sum(values) / len(values), rel=1e-5)}


@pytest.mark.slow
def test_two_processes_learn_from_pairs_as_one_does(tmp_path):
    words = ("model=dpo", "start=null", "policy.width=16", "policy.layers=1", "policy.heads=2", "policy.hidden=32",
             "data.batch_size=8", f"data.trajectories={ANSWERS}", "trainer.max_steps=12",
             "data.standin={sft: 20, prompts: 8, val: 4, test: 4, misconception: 0.6, slip: 0.0}")  # fmt: skip
    train(tmp_path / "one", *words)
    train(tmp_path / "two", *words, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    for column in ("train/loss", "grad_norm/policy", "train/rewards/margin"):
        one, two = (curve(tmp_path / side, "dpo", column) for side in ("one", "two"))
        assert len(one) == 12
        assert residuals(two, one)[0] <= 1e-5
