"""The ops are registered with PyTorch as it checks them."""

import pytest
import torch

from kernels import tpa
from tests.kernels.tpa_cases import factor_pairs

FACTORS = {"heads": 2, "dims": (4, 4, 4), "ranks": (2, 1, 1), "dtype": torch.float32}


def cases() -> dict:
    """An example call for every op."""
    torch.manual_seed(0)
    six = [x.requires_grad_() for x in factor_pairs(5, **FACTORS)]
    cos, sin = tpa.rotary_table(8, 4)
    positions, row = torch.tensor([3, 1, 2, 7, 0]), torch.randn(5, 24, requires_grad=True)
    out = torch.ops.tessera
    cache = factor_pairs(2, 9, heads=2, dims=(4, 4), ranks=(2, 1), dtype=torch.float32)
    lengths = torch.tensor([9, 4])
    return {
        "contract": (out.tpa_contract, (six[0], six[1])),
        "rotate": (out.tpa_rotate, (six[1], cos, sin, positions, False)),
        "qkv": (out.tpa_qkv, (row, cos, sin, positions, [2, 1, 1], 2, [4, 4, 4])),
        "attention": (out.tpa_attention, (*six, *[None] * 4, 5, 5, 1, True, 0.5)),
        "decode": (out.tpa_decode, (torch.randn(2, 1, 2, 4), *cache, lengths, None, 0.5, 2)),
    }


@pytest.mark.parametrize("op", list(cases()))
def test_pytorch_agrees_with_the_registration(op):
    call, arguments = cases()[op]
    torch.library.opcheck(call.default, arguments)
