"""Text from a language model, one token after another."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
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
    *,
    mask: Bool[Tensor, "batch prompt"] | None = None,
    chunk: int | None = None,
    on_token: Callable[[Int[Tensor, " batch"]], None] = lambda token: None,
) -> Int[Tensor, "batch total"]:
    """The prompts with `max_new` tokens of the real vocabulary behind each; `stop` is repeated after its first time.

    `temperature` 0 takes the most probable token; `top_k` draws among so many. `generator` is on the network's device.
    What a layer computed is kept while everything fits the context; beyond it each token sees the last `context` tokens
    at places counted from 0, which has to be computed anew. It never ends early, so that the processes of a sharded
    network take as many steps.

    `mask` says which of `ids` are tokens, for prompts of several lengths that are padded on either side: each row goes
    on as it would alone, and comes back padded on the left. The prompts are read `chunk` tokens at once, all by
    default. `on_token` is called with each new token of the rows, for a progress bar or a stream of text.
    Raises ValueError for settings that sample nothing and for a prompt without tokens.
    """
    _check(ids, max_new, temperature, top_k, chunk)
    padding = None
    if mask is not None:
        ids, padding = left_padded(ids, mask)
    was_training = network.training
    network.eval()
    try:
        # compiled, every length would be a program of its own
        with torch.compiler.set_stance("force_eager"):
            caches = [Cache(min(network.context, ids.shape[1] + max_new)) for _ in network.blocks]

            def choose(ids: Tensor) -> Tensor:
                logits = _next(network, ids, caches, padding, chunk)[:, : network.vocab_size]
                return draw(logits, temperature, top_k, generator)

            return _extended(ids, max_new, choose, stop, on_token)
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
    ids: Tensor,
    max_new: int,
    choose: Callable[[Tensor], Tensor],
    stop: int | None,
    on_token: Callable[[Int[Tensor, " batch"]], None],
) -> Int[Tensor, "batch total"]:
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new):
        token = choose(ids)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended |= token == stop
        ids = torch.cat([ids, token[:, None]], 1)
        on_token(token)
    return ids


def left_padded(
    ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, " batch"]]:
    """The rows with their tokens moved to the end, and how many that are none are before them.

    Raises ValueError for a row without tokens.
    """
    if not mask.any(1).all():
        raise ValueError("a prompt is empty, its mask is all false: start with the token that separates documents")
    order = mask.int().argsort(dim=1, stable=True)
    return ids.gather(1, order), ids.shape[1] - mask.sum(1)


def _next(
    network: Decoder, ids: Tensor, caches: list[Cache], padding: Tensor | None, chunk: int | None
) -> Float[Tensor, "batch padded"]:
    """Logits after the last of these tokens, of which the caches have seen all but the newest."""
    dropped = ids.shape[1] - network.context
    if dropped > 0:
        padding = None if padding is None else (padding - dropped).clamp(min=0)
        return network(ids[:, dropped:], padding=padding, last=True)[:, 0]
    new = ids[:, caches[0].length :]
    for part in new.split(chunk or new.shape[1], 1):
        logits = network(part, caches=caches, padding=padding, last=True)
    return logits[:, 0]


def _check(ids: Tensor, max_new: int, temperature: float, top_k: int | None, chunk: int | None) -> None:
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: start with the token that separates documents")
    if max_new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"max_new={max_new}, temperature={temperature}, top_k={top_k} sample nothing: take max_new and temperature "
            "of at least 0, and top_k of at least 1 or null"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} reads nothing: take at least 1 token at once, or null for all")
