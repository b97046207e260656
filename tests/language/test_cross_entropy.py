"""The loss in chunks is the loss: value, gradients, and no more logits in memory than asked for."""

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.language import cross_entropy
from lightning_modules.language.cross_entropy import nll


def head(count: int = 50, width: int = 24, vocabulary: int = 128):
    torch.manual_seed(0)
    hidden = torch.randn(count, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    return hidden, weight, torch.randint(100, (count,))


def values_and_gradients(chunk: int | None, softcap: float | None, autocast: bool = False):
    hidden, weight, targets = head()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = nll(hidden, weight, targets, chunk, softcap)
    (losses * torch.linspace(-1, 2, len(losses))).sum().backward()
    return losses.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 64])
def test_chunks_change_neither_value_nor_gradient(chunk, softcap):
    for ours, whole in zip(values_and_gradients(chunk, softcap), values_and_gradients(None, softcap)):
        assert (ours - whole).norm() <= 1e-6 * whole.norm()


def test_the_whole_is_torch_s_cross_entropy():
    hidden, weight, targets = head()
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(nll(hidden, weight, targets), expected)


def test_chunks_change_nothing_under_autocast():
    losses, *gradients = values_and_gradients(7, None, autocast=True)
    expected, *wholes = values_and_gradients(None, None, autocast=True)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)
    for ours, whole in zip(gradients, wholes):  # the weight's is a sum of bfloat16 products of other lengths
        assert (ours - whole).norm() <= 1e-2 * whole.norm()


def test_no_more_than_a_chunk_of_logits_is_alive(monkeypatch):
    sizes, original = [], cross_entropy.logits
    monkeypatch.setattr(
        cross_entropy, "logits", lambda hidden, *rest: sizes.append(len(hidden)) or original(hidden, *rest)
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        hidden, weight, targets = head()
        losses = nll(hidden, weight, targets, 20)
    losses.sum().backward()
    assert sizes == [20, 20, 10, 10, 20, 20] or sizes == [20, 20, 10, 20, 20, 10]
    assert (20, 128) not in kept
