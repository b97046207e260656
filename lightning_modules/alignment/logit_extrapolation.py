"""Two language models as one whose logits are (1 + alpha) z_fitted - alpha z_previous, to sample from."""

import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lightning_modules.alignment.policy import Policy

PER_LAYER = ("layer_types",)  # lists in a configuration with an entry for every layer


class Extrapolated(PreTrainedModel):
    """Both models side by side: hidden states concatenated, and one head (1 + alpha) W_fitted | -alpha W_previous.

    Token by token the softmax of the extrapolated logits is the extrapolated policy; over a whole answer it is an
    approximation of it, because each token is normalised by itself.
    """

    config_class = PretrainedConfig
    base_model_prefix = "bodies"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # as far as the two models do

    def __init__(self, fitted: PreTrainedModel, previous: PreTrainedModel, alpha: float) -> None:
        super().__init__(_of_two(fitted.config))
        self.bodies = _Bodies(fitted.base_model, previous.base_model, fitted.config)
        self.head = _head(fitted.get_output_embeddings(), previous.get_output_embeddings(), alpha)
        self.generation_config = copy.deepcopy(fitted.generation_config)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Int[Tensor, "batch length"], **settings: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.head(self.bodies(input_ids=input_ids, **settings).last_hidden_state))


class _Bodies(nn.Module):
    def __init__(self, fitted: nn.Module, previous: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.both, self.config = nn.ModuleList([fitted, previous]), config

    def forward(
        self, past_key_values: Cache | None = None, use_cache: bool = False, **inputs: Any
    ) -> BaseModelOutputWithPast:
        caches = [None, None] if past_key_values is None else self._halves(past_key_values)
        hidden = [
            body(past_key_values=cache, use_cache=use_cache, **inputs).last_hidden_state
            for body, cache in zip(self.both, caches)
        ]
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(hidden, -1))

    def _halves(self, cache: Cache) -> list[Cache]:
        """Two caches that share the layers of one, because each model counts its layers from 0."""
        half = len(cache.layers) // 2
        halves = [DynamicCache(config=self.config) for _ in self.both]
        halves[0].layers, halves[1].layers = cache.layers[:half], cache.layers[half:]
        return halves


def extrapolated(fitted: Policy, previous: Policy, alpha: float) -> Policy:
    """The policy softmax((1 + alpha) z_fitted - alpha z_previous); it shares the two models' weights but the head's."""
    model = Extrapolated(fitted.causal_lm, previous.causal_lm, alpha)
    made = Policy(model, fitted.tokenizer)
    made.is_frozen = True
    return made.eval()


@torch.no_grad()
def _head(fitted: nn.Linear, previous: nn.Linear, alpha: float) -> nn.Linear:
    head = nn.Linear(2 * fitted.in_features, fitted.out_features, fitted.bias is not None)
    head = head.to(fitted.weight).requires_grad_(False)
    head.weight.copy_(torch.cat([(1 + alpha) * fitted.weight, -alpha * previous.weight], 1))
    if fitted.bias is not None:
        head.bias.copy_((1 + alpha) * fitted.bias - alpha * previous.bias)
    return head


def _of_two(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with twice the layers, for which a cache is made."""
    config = copy.deepcopy(config)
    for name in PER_LAYER:
        if getattr(config, name, None) is not None:
            setattr(config, name, [*getattr(config, name), *getattr(config, name)])
    config.num_hidden_layers *= 2
    return config
