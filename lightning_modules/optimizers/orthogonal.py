"""The orthogonal factor U V^T of a matrix M = U S V^T: the direction in which Muon and MARS-Shampoo step."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# chosen for the steepest slope at 0: singular values end near 1, not at 1 (Jordan et al., Muon, 2024)
QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    matrix: Float[Tensor, "rows cols"],
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    eps: float = 1e-8,
) -> Float[Tensor, "rows cols"]:
    """U V^T but for singular values of about 0.7 to 1.2, by X <- a X + (b A + c A A) X with A = X X^T, in bfloat16.

    `eps` bounds the Frobenius norm that the matrix is divided by from below.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def polar(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """U V^T by singular values, zero in the directions in which the matrix is zero."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rounding = max(matrix.shape) * torch.finfo(s.dtype).eps * s.max()
    return (u * (s > rounding)) @ vh


def shape_factor(rows: int, cols: int, scale: str) -> float:
    """What the orthogonal factor is multiplied by: "original" (Muon), "match_rms_adamw" (arXiv 2502.16982), "none"."""
    if scale == "original":
        return math.sqrt(max(1, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols)) if scale == "match_rms_adamw" else 1.0
