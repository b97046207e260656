"""Text from a language model, one token after another."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.language.attention import Cache
from lightning_modules.language.decoder import Decoder


@torch.no_grad()
def generate(
    network: Decoder,
    ids: Int[Tensor, "batch prompt"],
    max_new: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> Int[Tensor, "batch total"]:
    """The prompts with `max_new` tokens of the real vocabulary behind each; `stop` is repeated after its first time.

    `temperature` 0 takes the most probable token; `top_k` draws among so many. `generator` is on the network's device.
    What a layer computed is kept while everything fits the context; beyond it each token sees the last `context` tokens
    at places counted from 0, which has to be computed anew. It never ends early, so that the processes of a sharded
    network take as many steps. Raises ValueError for settings that sample nothing.
    """
    _check(ids, max_new, temperature, top_k)
    was_training = network.training
    network.eval()
    try:
        # compiled, every length would be a program of its own
        with torch.compiler.set_stance("force_eager"):
            return _extended(network, ids, max_new, lambda logits: draw(logits, temperature, top_k, generator), stop)
    finally:
        network.train(was_training)


def draw(
    logits: Float[Tensor, "batch vocabulary"],
    temperature: float,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """One token of each row; see `generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    chosen = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return tokens.gather(-1, chosen)[:, 0]


def _extended(
    network: Decoder, ids: Tensor, max_new: int, choose: Callable[[Tensor], Tensor], stop: int | None
) -> Int[Tensor, "batch total"]:
    caches = [Cache(min(network.context, ids.shape[1] + max_new)) for _ in network.blocks]
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new):
        token = choose(_next(network, ids, caches)[:, : network.vocab_size])
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended |= token == stop
        ids = torch.cat([ids, token[:, None]], 1)
    return ids


def _next(network: Decoder, ids: Tensor, caches: list[Cache]) -> Float[Tensor, "batch padded"]:
    """Logits after the last of these tokens, of which the caches have seen all but the newest."""
    if ids.shape[1] > network.context:
        return network(ids[:, -network.context :], last=True)[:, 0]
    return network(ids[:, caches[0].length :], caches=caches, last=True)[:, 0]


def _check(ids: Tensor, max_new: int, temperature: float, top_k: int | None) -> None:
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: start with the token that separates documents")
    if max_new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"max_new={max_new}, temperature={temperature}, top_k={top_k} sample nothing: take max_new and temperature "
            "of at least 0, and top_k of at least 1 or null"
        )
