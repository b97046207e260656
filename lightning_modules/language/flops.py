"""What a training step costs in floating-point operations, and how much of a device's peak that is."""

import re

import torch

# dense bfloat16 and float16, without sparsity; NVIDIA's data sheets. The PCIe and NVL cards of Hopper are slower and a
# part of a card (MIG) is less than its name says, so these are not in the table
PEAK = {
    r"\bA100\b(?!.*\bMIG\b)": 312e12,
    r"\bH[12]00\b(?!.*\b(PCIe|NVL|MIG)\b)": 989.4e12,
}


def flops_per_token(parameters: int, layers: int, width: int, length: int) -> int:
    """Forward and backward pass of one token: 6 N + 12 L C T (PaLM, arXiv 2204.02311, appendix B).

    `parameters` without the position embedding, `width` over all heads. Attention is counted in full although half of
    its scores are masked, as nanoGPT and llm.c do.
    """
    return 6 * parameters + 12 * layers * width * length


def mfu(tokens_per_s: float, flops_per_token: int, device_name: str, dtype: torch.dtype) -> float | None:
    """Model FLOPs utilisation of one device in [0, 1]; None where its peak is not known.

    `device_name` is `torch.cuda.get_device_name()`, `tokens_per_s` those of one device.
    """
    peaks = [peak for pattern, peak in PEAK.items() if re.search(pattern, device_name)]
    if dtype not in (torch.bfloat16, torch.float16) or not peaks:
        return None
    return tokens_per_s * flops_per_token / peaks[0]
