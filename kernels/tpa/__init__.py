"""Tensor Product Attention (arXiv 2501.06425) on factors: each op as a Triton kernel and a PyTorch reference.

A factored tensor is X[t] = 1/R sum_r a[t, r] b[t, r]^T, with head factors a [tokens, rank, heads] and token factors
b [tokens, rank, dim]. Every op takes `impl`: "auto", "triton" or "torch" (`dispatch`).
"""

from kernels.tpa.attention.ops import attention, packed_attention
from kernels.tpa.contraction.ops import contract, qkv, rotary_table, rotate
from kernels.tpa.decode.ops import decode

__all__ = ["attention", "contract", "decode", "packed_attention", "qkv", "rotary_table", "rotate"]
