"""What an online method knows, side by side for many copies: tables of means, or least squares on features.

A learner has a value for every action, its estimate plus its bonus, and learns from one reward a copy and round.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

REFACTOR = 1000  # rounds after which the inverse Gram matrix is computed anew


class Tabular(nn.Module):
    """The mean reward of every context and action, plus min(high - low, radius / sqrt(n)).

    Rewards are counted from `low`, which changes no policy: where n is 0 the mean is 0 and the bonus high - low.
    """

    def __init__(self, shape: tuple[int, ...], radius: Float[Tensor, "copy 1 1"], low: float, high: float) -> None:
        super().__init__()
        self.low, self.span = low, high - low
        for name, start in {"count": 0.0, "total": 0.0}.items():
            self.register_buffer(name, torch.full(shape, start, dtype=torch.float64))
        self.register_buffer("radius", radius, persistent=False)
        self.bold = bool(radius.any())

    def value(self, features: None) -> Float[Tensor, "copy context action"]:
        """The optimistic value; without a bonus the mean, 0 where there is none."""
        estimate = self.total / self.count.clamp(min=1)
        return estimate.add_((self.radius * self.count.rsqrt()).clamp_(max=self.span)) if self.bold else estimate

    def learn(self, cell: Int[Tensor, "copy 1"], chosen: None, reward: Float[Tensor, "copy 1"]) -> None:
        """Count a reward in its cell, context times actions plus action."""
        self.count.flatten(1).scatter_add_(1, cell, torch.ones_like(reward))
        self.total.flatten(1).scatter_add_(1, cell, reward - self.low)


class Linear(nn.Module):
    """Ridge regression on features, plus min(span, radius |phi|_{V^-1}) with V = ridge I + sum phi phi^T.

    V^-1 follows V by the formula of Sherman and Morrison and is computed anew every thousand rounds.
    """

    def __init__(
        self, copies: int, features: int, radius: Float[Tensor, "copy 1 1"], span: float, ridge: float
    ) -> None:
        super().__init__()
        self.span = span
        eye = torch.eye(features, dtype=torch.float64).expand(copies, -1, -1)
        states = {"gram": ridge * eye, "inverse": eye / ridge, "moment": torch.zeros(copies, features, 1).double()}
        for name, state in {**states, "learned": torch.zeros((), dtype=torch.int64)}.items():
            self.register_buffer(name, state.clone())
        self.register_buffer("radius", radius, persistent=False)
        self.bold = bool(radius.any())

    def value(self, features: Float[Tensor, "copy context action feature"]) -> Float[Tensor, "copy context action"]:
        """The optimistic value of every vector of features."""
        rows = features.flatten(1, 2)
        estimate = (rows @ (self.inverse @ self.moment))[..., 0]
        if self.bold:
            uncertainty = ((rows @ self.inverse) * rows).sum(-1).sqrt()
            estimate = estimate + (self.radius[..., 0] * uncertainty).clamp(max=self.span)
        return estimate.unflatten(1, features.shape[1:3])

    def learn(self, cell: Tensor, chosen: Float[Tensor, "copy feature"], reward: Float[Tensor, "copy 1"]) -> None:
        """Learn the reward of the chosen features."""
        column = chosen[..., None]
        self.gram.add_(column @ column.mT)
        self.moment.add_(column * reward[..., None])
        self.learned.add_(1)
        if int(self.learned) % REFACTOR == 0:
            self.inverse.copy_(torch.linalg.inv(self.gram))
            return
        moved = self.inverse @ column
        self.inverse.sub_(moved @ (moved.mT / (1 + column.mT @ moved)))
