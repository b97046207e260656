"""The mean loss of all tokens of an evaluation, whatever the number of batches and processes."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean negative log-likelihood of a token (nats), and by its place in a row; perplexity is its exponential.

    torchmetrics' own Perplexity takes the logits of the whole batch, is infinite where a probability underflows, and
    counts in float32, which stands still at 2^24 tokens. Here both sums are float64.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"] | None = None) -> None:
        """Add the losses of some tokens, of those only that are in `mask`."""
        mask = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask
        self.nll += nll.detach().double().where(mask, 0.0).sum(0)
        self.tokens += mask.sum(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Metric:
        # the module it belongs to may move it, but a cast of that module to half precision would round the sums
        return super()._apply(lambda state: state.to(fn(state).device), *args, **kwargs)

    def compute(self) -> Float[Tensor, " places"]:
        """Mean over all tokens so far, on all processes, then over those at each place; NaN where there was none."""
        nll, tokens = (torch.cat([state.sum()[None], state]) for state in (self.nll, self.tokens))
        return nll / tokens
