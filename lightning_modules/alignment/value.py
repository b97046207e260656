"""State values for a language policy: a network of its own, or a head on the policy's trunk."""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_modules.alignment.policy import Policy


class ValueNetwork(nn.Module):
    """A copy of the policy's trunk with a scalar head that starts at zero (arXiv 2412.16145, appendix A).

    It recomputes activations where the policy does.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        trunk = copy.deepcopy(policy.model).merge_and_unload() if policy.adapted else copy.deepcopy(policy.model)
        self.trunk = trunk.base_model.requires_grad_(True)
        self.head = ValueHead(policy.width)

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length-1"]:
        """V(s) of the state before each predicted token: position t speaks of the prefix that ends with `ids[:, t]`."""
        return self.head(self.trunk(input_ids=ids[:, :-1], use_cache=False).last_hidden_state)

    def shard_units(self) -> list[nn.Module]:
        """The layers, then the whole."""
        return [*self.trunk.layers, self]


class ValueHead(nn.Module):
    """A linear map from hidden states to values, zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "batch steps width"]) -> Float[Tensor, "batch steps"]:
        """Values in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            # FSDP2 hangs its backward hook on what is returned, which a view could lose
            return self.linear(hidden.float()).squeeze(-1).clone()
