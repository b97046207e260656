"""General Preference embeddings (arXiv 2410.02197): a skew-symmetric score of two vectors, and its losses.

An embedding of 2k numbers is k points of the plane, (v[0], v[1]), (v[2], v[3]), ...; with z_l = v[2l] + i v[2l + 1] the
score is s(i > j) = sum_l lambda_l Im(conj(z_il) z_jl). Section 4.2 and theorem 4.4 print v_i^T R v_j, which is -s: the
sign here is that of equation 4.1 and of the released code.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor


def score(
    first: Float[Tensor, "*batch d"], second: Float[Tensor, "*batch d"], scale: Float[Tensor, "*batch k"] | None = None
) -> Float[Tensor, "*batch"]:
    """s(first > second) = <R v_i, v_j> (equation 4.1); `scale` holds lambda, 1 where None. Float32 at least.

    A difference of products cancels: what comes in half precision is made single first. Raises ValueError when d is
    odd.
    """
    if first.shape[-1] % 2:
        raise ValueError(
            f"a preference embedding has {first.shape[-1]} dimensions, which is odd: take an even model.judge.head.dim"
        )
    first, second = _exact(first), _exact(second)
    planes = first[..., 0::2] * second[..., 1::2] - first[..., 1::2] * second[..., 0::2]
    return (planes if scale is None else planes * _exact(scale)).sum(-1)


def score_matrix(
    embeddings: Float[Tensor, "*batch n d"], scale: Float[Tensor, "*batch k"] | None = None
) -> Float[Tensor, "*batch n n"]:
    """S[i, j] = s(i > j) of n answers to one prompt, by one product of matrices; antisymmetric to the last bit."""
    embeddings = _exact(embeddings)
    x, y = embeddings[..., 0::2], embeddings[..., 1::2]
    scaled = x if scale is None else x * _exact(scale)[..., None, :]
    products = scaled @ y.mT
    return products - products.mT


def cross_entropy(
    score: Float[Tensor, " pair"], label: Float[Tensor, " pair"], tau: float, margin: float = 0.0
) -> Float[Tensor, " pair"]:
    """-p log sigma(s / tau) - (1 - p) log sigma(-s / tau): the negative log-likelihood (appendix A.2), nats.

    `label` p in [0, 1] is the probability that the first answer is better; 0 and 1 are hard labels. A `margin` >= 0 is
    what the score of the better one has to exceed before it counts as right.
    """
    return -label * F.logsigmoid((score - margin) / tau) - (1 - label) * F.logsigmoid((-score - margin) / tau)


def regression(
    score: Float[Tensor, " pair"], label: Float[Tensor, " pair"], tau: float, limit: float = 10.0
) -> Float[Tensor, " pair"]:
    """(s / tau - s_D)^2 (appendix A.2): the squared distance from the label's log-odds, nats^2.

    `limit` bounds those: it is the target of a hard label, 10 in the released code.
    """
    return (score / tau - torch.logit(label).clamp(-limit, limit)).square()


def scalar_embedding(reward: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch 2*k"]:
    """[r_1, 1, r_2, 1, ...]: with this embedding the score is Bradley and Terry's, sum_l lambda_l (r_il - r_jl)."""
    return torch.stack([reward, torch.ones_like(reward)], -1).flatten(-2)


def direct_embedding(skew: Float[Tensor, "n n"]) -> Float[Tensor, "n 2*n"]:
    """2n dimensions that give any skew-symmetric matrix of scores exactly (theorem 4.4): (S_i / 2, e_i) by planes."""
    return torch.stack([_skew(skew) / 2, torch.eye(len(skew)).to(skew)], -1).flatten(1)


def spectral_embedding(skew: Float[Tensor, "n n"]) -> Float[Tensor, "n d"]:
    """The same in d = 2 floor(n / 2) dimensions, a plane for each pair of eigenvalues +-i lambda (theorem 4.5).

    The theorem reads them from the real Schur form; the Hermitian matrix iS has the same planes, and eigenvalues in
    order.
    """
    eigenvalues, vectors = torch.linalg.eigh(1j * _skew(skew))
    planes = len(skew) // 2
    points: Complex[Tensor, "n k"] = vectors[:, -planes:].conj() * (2 * eigenvalues[-planes:].clamp(min=0)).sqrt()
    return torch.view_as_real(points).flatten(1)


def cyclic_share(skew: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """The share of sum S_ij^2 that no scalar explains, in [0, 1]: 0 for a Bradley-Terry table, 1 for a balanced cycle.

    The Hodge decomposition of a complete comparison graph: the nearest table r_i - r_j has r_i = mean_j S_ij.
    """
    reward = _skew(skew).mean(1)
    cyclic = skew - (reward[:, None] - reward[None])
    return cyclic.square().sum() / skew.square().sum().clamp(min=torch.finfo(skew.dtype).tiny)


def right(score: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> Bool[Tensor, " pair"]:
    """Whether the better answer has the higher score; a score of 0 decides nothing and is wrong."""
    return torch.where(label > 0.5, score > 0, score < 0)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _skew(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    worst = (matrix + matrix.mT).abs().max()
    if worst > 1e-5 * matrix.abs().max():
        raise ValueError(
            f"a table of preference scores is antisymmetric, but S + S^T reaches {worst:.3g} here: average both orders"
        )
    return matrix
