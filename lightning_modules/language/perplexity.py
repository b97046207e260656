"""The mean loss of all tokens of an evaluation, whatever the number of batches and processes."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean negative log-likelihood of a token (nats); perplexity is its exponential.

    torchmetrics' own Perplexity takes the logits of the whole batch, is infinite where a probability underflows, and
    counts in float32, which stands still at 2^24 tokens. Here both sums are float64.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None) -> None:
        """Add the losses of some tokens, of those only that are in `mask`."""
        kept = nll.detach().double() if mask is None else nll.detach().double()[mask]
        self.nll += kept.sum()
        self.tokens += kept.numel()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Metric:
        # the module it belongs to may move it, but a cast of that module to half precision would round the sums
        return super()._apply(lambda state: state.to(fn(state).device), *args, **kwargs)

    def compute(self) -> Float[Tensor, ""]:
        """Mean over all tokens so far, on all processes; NaN when there was none."""
        return self.nll / self.tokens
