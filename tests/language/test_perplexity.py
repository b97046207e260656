"""The mean over all tokens, where the stock metric overflows, stalls or rounds."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.text import Perplexity

from lightning_modules.language.perplexity import TokenLoss


def of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")


def perplexity(*losses: torch.Tensor) -> float:
    metric = TokenLoss(losses[0].shape[1])
    for loss in losses:
        metric.update(loss)
    return metric.compute()[0].exp().item()


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    logits, targets = torch.zeros(1, 4, 50304), torch.tensor([[0, 7, 50256, 50303]])
    stock = Perplexity()
    stock.update(logits, targets)
    assert stock.compute().item() == pytest.approx(50304.008, abs=1e-3)
    assert perplexity(of(logits, targets)) == pytest.approx(50304, rel=1e-5)


def test_it_agrees_with_the_stock_metric_and_with_the_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 10, 50), torch.randint(50, (6, 10))
    stock = Perplexity()
    for part in (slice(0, 1), slice(1, 6)):
        stock.update(logits[part], targets[part])
    losses = of(logits, targets)
    ours = perplexity(losses[:1], losses[1:])
    assert ours == pytest.approx(stock.compute().item(), rel=1e-5)
    assert ours == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp().item(), rel=1e-5)


def test_only_the_masked_tokens_count():
    loss, mask = torch.arange(6.0).view(2, 3), torch.tensor([[True, False, True], [False, False, True]])
    metric = TokenLoss(3)
    metric.update(loss, mask)
    metric.update(loss, torch.zeros_like(mask))
    assert metric.tokens.tolist() == [1, 0, 2]
    whole, *places = metric.compute().tolist()
    assert whole == pytest.approx((0 + 2 + 5) / 3)
    assert places == pytest.approx([0, math.nan, 3.5], nan_ok=True)


def test_an_improbable_token_is_finite_where_the_stock_metric_is_not():
    logits, targets = torch.tensor([[[200.0, 0.0]]]), torch.tensor([[1]])
    stock = Perplexity()
    stock.update(logits, targets)
    assert stock.compute().isinf()
    metric = TokenLoss(1)
    metric.update(of(logits, targets))
    assert metric.compute()[0].item() == 200


def test_counting_goes_on_beyond_two_to_the_twenty_four_where_the_stock_metric_stands_still():
    stock, ours = Perplexity(), TokenLoss(1)
    stock.count, ours.tokens, ours.nll = (torch.full_like(x, 2.0**24) for x in (stock.count, ours.tokens, ours.nll))
    stock.update(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))
    ours.update(torch.tensor([[0.5]]))
    assert stock.count == 2**24
    assert ours.tokens == 2**24 + 1
    assert ours.nll == 2**24 + 0.5


def test_the_parts_of_several_processes_add_up():
    torch.manual_seed(0)
    losses = torch.rand(5, 7)
    one, other = TokenLoss(7), TokenLoss(7)
    one.update(losses[:1])
    other.update(losses[1:])
    assert all(one._reductions[state](torch.ones(2)) == 2 for state in ("nll", "tokens"))
    one.merge_state(other)
    assert one.compute()[0].item() == pytest.approx(losses.double().mean().item(), rel=1e-12)


def test_a_cast_of_the_module_that_has_it_rounds_nothing():
    module = torch.nn.ModuleDict({"loss": TokenLoss(1000), "network": torch.nn.Linear(2, 2)})
    module["loss"].update(torch.full((2, 1000), 1.001))
    module.to(torch.bfloat16).half()
    assert module["network"].weight.dtype == torch.float16
    assert module["loss"].compute().dtype == torch.float64
    assert module["loss"].compute()[0].item() == pytest.approx(1.001)
    module["loss"].reset()
    assert module["loss"].nll.dtype == module["loss"].tokens.dtype == torch.float64


def test_no_token_is_no_number():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert TokenLoss(2).compute().isnan().all()
