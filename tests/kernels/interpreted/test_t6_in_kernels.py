"""T6 with its kernels is T6 without: logits, gradients, generation; and what they cannot do is done in PyTorch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.language.attention import Cache
from lightning_modules.language.sampling import generate
from lightning_modules.language.t6 import T6, TENSOR_PRODUCTS
from tests.kernels.tpa_cases import close
from tests.language.test_gpt2 import tokens, trained_like
from tests.language.test_t6 import toy

SLOW = pytest.mark.slow
FAST_ONES = ("tpa", "tpa_kvonly")
every_product = pytest.mark.parametrize(
    "attention", [word if word in FAST_ONES else pytest.param(word, marks=SLOW) for word in TENSOR_PRODUCTS]
)


class Kernels(TorchDispatchMode):
    """The names of our own ops that are called inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "tessera":
            self.called.add(op._opname.removeprefix("tpa_"))
        return op(*args, **(kwargs or {}))


def both(attention: str = "tpa") -> tuple[T6, T6]:
    """The same network twice: with kernels, and without."""
    small = {"attention": attention, "layers": 1, "width": 16, "heads": 2, "ranks": (2, 1, 1)}
    return tuple(trained_like(toy(**small, impl=impl)) for impl in ("triton", "torch"))


@every_product
def test_logits_and_gradients_are_those_of_the_reference(attention):
    (ours, theirs), (ids, targets) = both(attention), tokens(2, 11)
    with Kernels() as kernels:
        losses = ours(ids, targets)
        losses.sum().backward()
    wanted = theirs(ids, targets)
    wanted.sum().backward()
    close(losses, wanted)
    for found, expected in zip(ours.parameters(), theirs.parameters()):
        close(found.grad, expected.grad)
    one = "contract" if attention == "tpa_kvonly" else "attention"
    assert kernels.called == {one, f"{one}_backward"}


@every_product
def test_generation_is_that_of_the_reference(attention):
    (ours, theirs), (ids, _) = both(attention), tokens(2, 13)
    with Kernels() as kernels:
        rows = generate(ours, ids, 5, temperature=0.0, chunk=11)
    assert torch.equal(rows, generate(theirs, ids, 5, temperature=0.0))
    assert "decode" in kernels.called


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 13, [3, 9, 1], [1, 2, 10]], ids=str)
def test_a_cache_in_any_parts_gives_the_logits_of_the_reference(parts):
    (ours, theirs), (ids, _) = both(), tokens(2, 13)
    caches = [Cache(20)]
    pieces = [ours(part, caches=caches) for part in ids.split(parts, 1)]
    close(torch.cat(pieces, 1), theirs(ids))


@torch.no_grad()
def test_documents_and_padding_go_without_the_kernels_of_attention():
    (ours, theirs), (ids, _) = both(), tokens(2, 11)
    places = torch.cat([torch.arange(7), torch.arange(4)]).expand(2, -1)
    padding, cached = torch.tensor([0, 4]), {"caches": [Cache(20)], "padding": torch.tensor([0, 4])}
    with Kernels() as kernels:
        close(ours(ids, positions=places), theirs(ids, positions=places))
        found = torch.cat([ours(part, **cached) for part in ids.split([10, 1], 1)], 1)
    close(found[0], theirs(ids, padding=padding)[0])
    close(found[1, 4:], theirs(ids, padding=padding)[1, 4:])
    assert kernels.called == {"contract"}


@torch.no_grad()
def test_mixed_precision_is_that_of_the_reference():
    (ours, theirs), (ids, _) = both(), tokens(2, 13)
    caches = [Cache(13)]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([ours(part, caches=caches) for part in ids.split([9, 1, 3], 1)], 1)
        close(found, theirs(ids), torch.bfloat16)


def test_few_tokens_that_want_a_gradient_are_read_without_the_kernel():
    (ours, theirs), (ids, targets) = both(), tokens(2, 11)
    for network in (ours, theirs):
        caches = [Cache(11)]
        network(ids[:, :9], caches=caches)
        network(ids[:, 9:], targets[:, 9:], caches=caches).sum().backward()
    for found, expected in zip(ours.parameters(), theirs.parameters()):
        close(found.grad, expected.grad)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)], ids=str)
def test_nothing_to_read_leaves_nothing_and_no_nan(shape):
    nothing = torch.zeros(shape, dtype=torch.long)
    for network in both():
        assert network(nothing).shape[:2] == shape
        network(nothing, nothing).sum().backward()
        assert all((parameter.grad == 0).all() for parameter in network.parameters())
