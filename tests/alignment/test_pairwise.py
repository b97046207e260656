"""Losses of pairs: the numbers of the specification, what cancels and what does not, and TRL's losses."""

import functools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_modules.alignment.pairwise import (
    dpo,
    gpo,
    hinge,
    ipo,
    mpo,
    regression,
    robust_dpo,
    sppo,
    sppo_hard,
    sppo_single,
)

A, B = torch.tensor([-12.3 + 13.0]), torch.tensor([-15.1 + 14.2])  # log-ratios of the specification's example
LENGTHS, ONE = torch.tensor([[7, 9]]), torch.ones(1)


def random_pairs(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = 4 * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return a, b, torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (dpo(A, B, ONE, beta=0.1), 0.616344),
        (ipo(A, B, ONE, LENGTHS, beta=0.1), 11.56),
        (ipo(A, B, ONE, LENGTHS, beta=0.1, length_norm=True), 23.04),
        (sppo_hard(A, B, ONE, beta=0.1), 35.30),
        (sppo(A, B, torch.tensor([[0.8, 0.3]]), beta=1e-3), 64610.65),
        (sppo_single(A, B, ONE, beta=0.1), 17.65),
        (hinge(A, B, ONE, beta=0.1), 0.84),
    ],
)
def test_the_numbers_of_the_specification(loss, expected):
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [dpo, robust_dpo, hinge, sppo_single, sppo_hard,
                                  functools.partial(ipo, lengths=LENGTHS.expand(64, 2))])  # fmt: skip
def test_a_pair_told_the_other_way_round_has_the_same_loss(loss):
    a, b, label = random_pairs()
    torch.testing.assert_close(loss(a, b, label=label, beta=0.3), loss(b, a, label=1 - label, beta=0.3))


def test_what_depends_on_the_prompt_alone_cancels_in_differences_and_not_in_regressions():
    a, b, label = random_pairs()
    shift = a.new_tensor(2.5)
    lengths, value = torch.full((64, 2), 5), torch.stack([label, 1 - label], 1)
    for loss in (dpo, robust_dpo, hinge, functools.partial(ipo, lengths=lengths)):
        torch.testing.assert_close(loss(a + shift, b + shift, label=label, beta=0.3), loss(a, b, label=label, beta=0.3))
    for loss in (functools.partial(sppo, value=value), functools.partial(sppo_hard, label=label)):
        assert (loss(a + shift, b + shift, beta=0.3) - loss(a, b, beta=0.3)).abs().min() > 1e-3


def test_a_label_between_0_and_1_is_the_mean_over_labels_drawn_with_that_probability():
    a, b, label = random_pairs()
    for loss in (dpo, robust_dpo, hinge):
        mean = label * loss(a, b, torch.ones_like(a), beta=0.3) + (1 - label) * loss(a, b, torch.zeros_like(a), 0.3)
        torch.testing.assert_close(loss(a, b, label, beta=0.3), mean)


def test_ipo_moves_its_target_with_the_label_and_keeps_the_gradient_of_the_mean():
    a, b, label = (x.requires_grad_() for x in random_pairs())
    lengths = torch.ones(64, 2, dtype=torch.long)
    ends = [ipo(a, b, torch.full_like(a, end), lengths, beta=0.3) for end in (1.0, 0.0)]
    mean = label.detach() * ends[0] + (1 - label.detach()) * ends[1]
    for x in (a, b):
        (ours,) = torch.autograd.grad(ipo(a, b, label.detach(), lengths, beta=0.3).sum(), x, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(mean.sum(), x, retain_graph=True)[0])


def test_robust_dpo_is_unbiased_under_flipped_labels_and_conservative_dpo_is_not():
    a, b, _ = random_pairs()
    one, eps = torch.ones_like(a), 0.2
    true = dpo(a, b, one, beta=0.3)
    flipped = lambda loss: (1 - eps) * loss(a, b, one, 0.3, eps) + eps * loss(a, b, 1 - one, 0.3, eps)  # noqa: E731
    torch.testing.assert_close(flipped(robust_dpo), true)
    assert (flipped(dpo) - true).abs().max() > 0.1


def test_dpo_is_minimal_where_the_policy_is_the_tilted_reference():
    """All pairs of five answers with exact Bradley-Terry labels: pi = pi_ref exp(r / beta) / Z."""
    r, beta = torch.tensor([0.0, 0.4, 1.0, -0.7, 0.2], dtype=torch.float64), 0.5
    first, second = torch.triu_indices(5, 5, 1)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], max_iter=200, **exact)

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_ratio = logits.log_softmax(0) - math.log(1 / 5)
        label = torch.sigmoid(r[first] - r[second])
        loss = dpo(log_ratio[first], log_ratio[second], label, beta=beta).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.softmax(0), (r / beta).softmax(0), rtol=0, atol=1e-7)


def test_sppo_hard_is_twice_the_single_probability_of_a_certain_label_and_nothing_at_a_tie():
    a, b, label = random_pairs()
    certain = (label > 0.5).double()
    torch.testing.assert_close(sppo_hard(a, b, label, beta=0.2), 2 * sppo_single(a, b, certain, beta=0.2))
    assert sppo_hard(torch.zeros(1), torch.zeros(1), torch.tensor([0.5]), beta=1e-3).item() == 0


def test_gpo_with_small_scores_is_sppo_with_a_quarter_of_the_scale():
    a, b, _ = random_pairs()
    score = 1e-3 * torch.stack([a, b], 1)
    ours = gpo(a, b, score, LENGTHS.expand(64, 2), beta=0.4)
    torch.testing.assert_close(ours, sppo(a, b, torch.sigmoid(score), beta=0.1), rtol=1e-6, atol=0)


def test_gpo_scales_and_clamps_its_targets_and_divides_by_lengths_when_asked():
    value = torch.tensor([[2.0, -300.0]])
    loss = functools.partial(gpo, A, B, value, LENGTHS, beta=0.1)
    torch.testing.assert_close(loss(score_scale=10.0), regression(A, B, torch.tensor([[200.0, -1000.0]])))
    normalised = regression(A / 7, B / 9, torch.tensor([[20.0, -1000.0]]))
    torch.testing.assert_close(loss(gamma=1.0), normalised)


def test_a_tie_leaves_the_policy_where_it_is_and_mpo_at_one_half_is_sppo():
    a, b, label = random_pairs()
    value = torch.stack([label, 1 - label], 1)
    torch.testing.assert_close(mpo(a, b, value, beta=0.1, center=0.5), sppo(a, b, value, beta=0.1))
    zero = torch.zeros(1, requires_grad=True)
    mpo(zero, zero.detach(), torch.full((1, 2), 1.5), beta=1e-3, center=1.5).backward()
    assert zero.grad.item() == 0


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (functools.partial(dpo, beta=0.0), "beta must be positive, but is 0.0; change model.loss.beta"),
        (functools.partial(dpo, beta=0.1, label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), but is 0.5"),
        (functools.partial(robust_dpo, beta=0.1, label_smoothing=0.6), "label_smoothing must be"),
        (functools.partial(ipo, beta=-1.0, lengths=LENGTHS), "beta must be positive"),
        (functools.partial(sppo_hard, beta=0.0), "beta must be positive"),
    ],
)
def test_values_that_make_no_sense_are_refused(loss, name):
    with pytest.raises(ValueError, match=name):
        loss(A, B, label=ONE)


@pytest.fixture
def trl_loss():
    """TRL's own loss code on given log-probabilities: `DPOTrainer._compute_loss` without its model and its data."""
    trl = pytest.importorskip("trl", reason="needs the extra bench")

    def compute(name: str, policy: list[Tensor], reference: Tensor, beta: float, label_smoothing: float) -> Tensor:
        order = [0, 2, 4, 1, 3, 5]  # TRL's batch is all chosen responses, then all rejected ones
        rows = torch.nn.utils.rnn.pad_sequence([policy[i] for i in order], batch_first=True)
        said = torch.nn.functional.pad(rows, (1, 0))  # one token of prompt
        mask = torch.zeros(6, rows.shape[1] + 2, dtype=torch.long)
        for row, i in enumerate(order):
            mask[row, 2 : 2 + len(policy[i])] = 1
        trainer = object.__new__(trl.DPOTrainer)
        settings = {"model": SimpleNamespace(training=True), "accelerator": Alone(), "aux_loss_enabled": False,
                    "ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl",
                    "loss_types": [name], "loss_weights": [1.0], "beta": beta, "label_smoothing": label_smoothing,
                    "use_weighting": False, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0,
                    "_tp_size": 1}  # fmt: skip
        vars(trainer).update(settings)
        nothing = torch.zeros_like(said)
        outputs = SimpleNamespace(log_probs=said, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask,
                  "ref_chosen_logps": reference[[0, 2, 4]], "ref_rejected_logps": reference[[1, 3, 5]]}  # fmt: skip
        return trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)

    return compute


class Alone:
    """One process."""

    device = torch.device("cpu")

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    gather_for_metrics = gather


OURS = {
    "sigmoid": (dpo, {}),
    "robust": (robust_dpo, {"label_smoothing": 0.2}),
    "hinge": (hinge, {}),
    "ipo": (ipo, {"lengths": True, "length_norm": True}),
    "sppo_hard": (sppo_hard, {}),
}


@pytest.mark.parametrize("name", OURS)
def test_losses_and_gradients_are_those_of_trl_on_random_log_probabilities(name, trl_loss):
    loss, options = OURS[name]
    generator = torch.Generator().manual_seed(1)
    steps = [4, 9, 6, 12, 3, 8]
    lengths = torch.tensor(steps).reshape(3, 2)  # (chosen, rejected) of three pairs
    tokens = [-torch.rand(n, generator=generator) for n in steps]
    policy = [x.clone().requires_grad_() for x in tokens]
    reference = torch.stack([x.sum() for x in tokens]) + torch.randn(6, generator=generator)
    theirs = trl_loss(name, policy, reference, beta=0.3, label_smoothing=options.get("label_smoothing", 0.0))
    grads = torch.autograd.grad(theirs, policy)
    a, b = (torch.stack([x.sum() for x in policy]) - reference).reshape(3, 2).T
    options = {key: lengths if key == "lengths" else value for key, value in options.items()}
    ours = loss(a, b, label=torch.ones(3), beta=0.3, **options).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, policy), grads):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
