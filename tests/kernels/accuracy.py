"""Errors of the interpreted kernels in each precision: `TRITON_INTERPRET=1 python -m tests.kernels.accuracy`.

Each is the largest over all numbers, in shares of the largest number of the definition in float64 on the same inputs.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels import tpa
from tests.kernels.tpa_cases import decoded, factor_pairs, materialised, softmax_attention

SIZES = {"heads": 3, "dims": (16, 16, 16), "ranks": (6, 2, 2)}


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in shares of the largest number."""
    return ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


def trained(run: Callable, inputs: list[Tensor], impl: str) -> tuple[Tensor, list[Tensor]]:
    """What `run` gives, and the gradients of its inputs for one random gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves, impl=impl)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, list(torch.autograd.grad(out, leaves, given))


def errors(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Each op, and the error that it makes."""
    six = factor_pairs(1, 36, **SIZES, dtype=dtype)
    q, lengths = torch.randn(3, 1, 5, 16).to(dtype), torch.tensor([53, 1, 20])
    cache = factor_pairs(3, 60, heads=5, dims=(16, 16), ranks=(2, 2), dtype=dtype)
    found = torch.ops.tessera.tpa_decode(q, *cache, lengths, None, 0.25, 4)
    yield "decoding, four splits", error(found, decoded(q, *cache, lengths))
    heads = [materialised(a[0], b[0]) for a, b in zip(six[::2], six[1::2])]
    yield "attention", error(tpa.attention(*six, impl="triton")[0], softmax_attention(*heads))
    yield "gradients of attention", gradient_error(tpa.attention, six)
    row, tables = torch.cat([x.flatten(2) for x in six], -1), tpa.rotary_table(36, 16)

    def projected(row: Tensor, impl: str) -> Tensor:
        return torch.cat(tpa.qkv(row, *tables, torch.arange(36)[None], SIZES["ranks"], 3, SIZES["dims"], impl=impl), -1)

    yield "split, rotation, contraction", error(projected(row, "triton"), projected(row.double(), "torch"))
    yield "their gradient", gradient_error(projected, [row])


def gradient_error(run: Callable, inputs: list[Tensor]) -> float:
    """The largest error of the gradients, against autograd of the reference in float64."""
    _, found = trained(run, inputs, "triton")
    _, wanted = trained(run, [x.double() for x in inputs], "torch")
    return max(error(ours, theirs) for ours, theirs in zip(found, wanted))


if __name__ == "__main__":
    columns = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        columns[dtype] = dict(errors(dtype))
    print("| |", *(f"{str(dtype).removeprefix('torch.')} |" for dtype in columns))
    print("|---" * (len(columns) + 1) + "|")
    for op in columns[torch.float64]:
        print(f"| {op} |", *(f"{column[op]:.0e} |" for column in columns.values()))
