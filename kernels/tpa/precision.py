"""What the kernels compute in: accumulators in float32 (float64 for float64), products in the dtype of the data."""

import torch
import triton.language as tl

from kernels.tpa.dispatch import INTERPRETED


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype of sums, of the softmax and of elementwise arithmetic."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def product(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the operands of a matrix product. Triton's interpreter gets products of bfloat16 silently wrong."""
    if dtype is torch.bfloat16 and INTERPRETED:
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))
