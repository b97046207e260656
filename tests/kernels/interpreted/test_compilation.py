"""The ops compile as part of one graph. Runs without the check of shapes, which no compiler can follow."""

import pytest
import torch

from kernels import tpa
from tests.kernels.tpa_cases import close, decoded, factor_pairs
from tests.language.compiled import check
from tests.language.test_t6 import toy


def layer(row, cos, sin, positions):
    """Everything between two projections: split, rotation, contraction, attention on heads and on factors."""
    parts = row.split([4, 8, 2, 4, 2, 4], -1)
    a_q, b_q, a_k, b_k, a_v, b_v = (x.unflatten(-1, (-1, w)) for x, w in zip(parts, (2, 4) * 3))
    b_q, b_k = (tpa.rotate(b, cos, sin, positions, impl="triton") for b in (b_q, b_k))
    values = tpa.attention(a_q, b_q, a_k, b_k, a_v, b_v, impl="triton")
    q, k, v = tpa.qkv(row, cos, sin, positions, (2, 1, 1), 2, (4, 4, 4), impl="triton")
    return values.sin() + (q * k).sum(-1, keepdim=True) * v + tpa.contract(a_v, b_v, impl="triton")


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("aot_eager", True),
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),  # compiles C++
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_layer_is_the_layer(backend, dynamic):
    row, (cos, sin) = torch.randn(2, 5, 24, requires_grad=True), tpa.rotary_table(8, 4)
    positions = torch.arange(5).expand(2, 5)
    found = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)(row, cos, sin, positions)
    wanted = layer(row, cos, sin, positions)
    close(found, wanted)
    close(*(torch.autograd.grad(x.square().sum(), row)[0] for x in (found, wanted)))


def test_a_compiled_decoding_step_is_the_step():
    q, cache = torch.randn(2, 1, 3, 8), factor_pairs(2, 20, heads=3, dims=(8, 8), ranks=(2, 1), dtype=torch.float32)

    def step(q, lengths):
        return tpa.decode(q, *cache, lengths, impl="triton").sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (5, 6):
        lengths = torch.tensor([n, 20])
        close(compiled(q, lengths), decoded(q, *cache, lengths).sin())


@pytest.mark.parametrize("attention", ["tpa", pytest.param("tpa_kvonly", marks=pytest.mark.slow)])
def test_t6_in_its_kernels_compiles_whole_and_once(attention):
    check(toy, attention=attention, impl="triton", layers=1, width=16, heads=2, ranks=(2, 1, 1))
