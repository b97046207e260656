"""Which policy is played once a value has been estimated: the regularised optimum for it, or a control.

`planned` is the optimum for the estimated value, `best` the one for the true rewards; all are logarithms.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def regularized(planned: Tensor, best: Tensor, log_reference: Tensor, value: Tensor) -> Tensor:
    """The optimum of the regularised objective for the estimate: what the papers play."""
    return planned


def greedy(planned: Tensor, best: Tensor, log_reference: Tensor, value: Tensor) -> Tensor:
    """The action of the largest value, without regularisation: with a bonus, UCB1 and LinUCB."""
    return F.one_hot(value.argmax(-1), value.shape[-1]).to(value.dtype).log()


def uniform(planned: Tensor, best: Tensor, log_reference: Tensor, value: Tensor) -> Tensor:
    """Every action equally often."""
    return torch.full_like(value, -math.log(value.shape[-1]))


def reference(planned: Tensor, best: Tensor, log_reference: Tensor, value: Tensor) -> Tensor:
    """The reference policy."""
    return log_reference.expand_as(value)


def oracle(planned: Tensor, best: Tensor, log_reference: Tensor, value: Tensor) -> Tensor:
    """The optimal policy for the true rewards, of gap 0."""
    return best.expand_as(value)
