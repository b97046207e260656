"""Sampling responses with a key-value cache, reproducibly: a response depends on its prompt's key and nothing else.

The uniform number behind each token is a pure function of (seed, prompt key, sample index, step), so that neither the
composition of a batch nor the number of processes nor an interruption changes what is sampled.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lightning_modules.alignment.policy import Policy

# a batch is compacted when this share of its rows has finished: below it the copy costs more than the idle rows
COMPACT_AT = 1 / 8
CACHE_STEP = 64  # tokens by which the cache grows


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; `temperature=0` is greedy, `top_p=1` and `top_k=0` do not truncate.

    Truncation follows the temperature: the `top_k` likeliest tokens, of these the fewest whose probability reaches
    `top_p`. `max_new` limits the response in tokens, the end token included. Raises ValueError on a value out of range.
    """

    temperature: float | int = 1.0
    top_p: float | int = 1.0
    top_k: int = 0
    max_new: int = 110
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1 (no truncation).")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k is {self.top_k}; it must be 0 (no truncation) or more.")
        if self.max_new < 1:
            raise ValueError(f"sampling.max_new is {self.max_new}; a response has at least 1 token.")
        # 1 and 1.0 are the same sampler and must give the same cache key
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_p", float(self.top_p))

    @property
    def is_plain(self) -> bool:
        """Whether the sampler's distribution is the policy's own."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Sample:
    """A response: its tokens (the end token last when `finished`) and their log-probabilities (nats).

    `log_probs` are those of the sampler that drew the tokens, after temperature and truncation; all zero when greedy.
    """

    ids: list[int]
    finished: bool
    log_probs: list[float]


def generate(
    policy: Policy,
    prompts: list[list[int]],
    k: int,
    sampling: Sampling,
    keys: list[str] | None = None,
    batch_rows: int = 512,
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield (position of the prompt, its `k` samples) batch by batch, prompts of similar length together.

    `keys` name the prompts for the random numbers (their positions when None). `batch_rows` bounds the responses
    sampled at once. Raises ValueError for an empty prompt and for one that leaves no room in the context.
    """
    if k < 1:
        raise ValueError(f"k is {k}; a prompt gets at least 1 sample.")
    for position, prompt in enumerate(prompts):
        if not 0 < len(prompt) < policy.context:
            raise ValueError(
                f"Prompt {position} has {len(prompt)} tokens; the policy's context of {policy.context} takes 1 to "
                f"{policy.context - 1}."
            )
    keys = [str(position) for position in range(len(prompts))] if keys is None else keys
    for batch in batches([len(prompt) for prompt in prompts], k, batch_rows):
        uniforms = _uniforms([keys[position] for position in batch], k, sampling)
        with _evaluating(policy):
            samples = _sample_batch(policy, [prompts[position] for position in batch], k, uniforms, sampling)
        for row, position in enumerate(batch):
            yield position, samples[row * k : (row + 1) * k]


def batches(lengths: list[int], k: int, batch_rows: int) -> list[list[int]]:
    """Positions in order of length, cut so that a batch has at most `batch_rows` responses (at least one prompt)."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = max(1, batch_rows // k)
    return [order[start : start + size] for start in range(0, len(order), size)]


def truncated_log_probs(logits: Float[Tensor, "row vocabulary"], sampling: Sampling) -> Float[Tensor, "row vocabulary"]:
    """Log-probabilities (nats, float32) of the sampler at temperature > 0; minus infinity where it truncates."""
    log_probs = torch.log_softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        drop[:, sampling.top_k :] = True
    if sampling.top_p < 1:
        kept = ordered.masked_fill(drop, -torch.inf).softmax(-1, dtype=torch.float64)
        drop |= kept.cumsum(-1) - kept >= sampling.top_p
    drop = torch.zeros_like(drop).scatter(-1, order, drop)
    return log_probs.masked_fill(drop, -torch.inf).log_softmax(-1)


def draw(
    logits: Float[Tensor, "row vocabulary"], uniforms: Float[Tensor, " row"] | None, sampling: Sampling
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """One token per row by inverting the cumulative distribution at `uniforms` in [0, 1), and its log-probability."""
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    log_probs = truncated_log_probs(logits, sampling)
    # float64: a float32 running sum over a large vocabulary loses the tail
    cumulative = log_probs.double().exp_().cumsum(-1)
    # the first token whose cumulative probability exceeds the number; one with probability zero never does
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    tokens = tokens.clamp_(max=logits.shape[1] - 1)
    return tokens[:, 0], log_probs.gather(1, tokens)[:, 0]


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    # in training mode, activation checkpointing silently switches the cache off
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


def _uniforms(keys: list[str], k: int, sampling: Sampling) -> Float[Tensor, "row step"] | None:
    """Numbers in [0, 1), float64, one counter-based stream per (seed, key, sample)."""
    if sampling.temperature == 0:
        return None
    streams = [_stream(f"{sampling.seed}/{sample}/{key}", sampling.max_new) for key in keys for sample in range(k)]
    return torch.from_numpy(np.stack(streams))


def _stream(name: str, steps: int) -> np.ndarray:
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(steps)


class _GrowingLayer(DynamicLayer):
    """Cache of one attention layer that writes into spare room instead of copying itself at every token."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self.room is None or end > self.room[0].shape[2]:
            self._grow(key_states, value_states, start, end + CACHE_STEP)
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def _grow(self, keys: Tensor, values: Tensor, filled: int, size: int) -> None:
        rooms = [new.new_empty(*new.shape[:2], size, new.shape[3]) for new in (keys, values)]
        if filled:
            rooms[0][:, :, :filled], rooms[1][:, :, :filled] = self.keys, self.values
        self.room, self.is_initialized = tuple(rooms), True

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


class _Decoder:
    """The model with its cache: prompts in, then a token per row and step, logits of the next token out."""

    def __init__(self, policy: Policy):
        model = policy.causal_lm
        self.body, self.head, self.device = model.base_model, model.get_output_embeddings(), model.device
        self.cache = DynamicCache(config=model.config)
        # layers with a sliding window keep their own kind
        self.cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self.mask: Tensor | None = None

    def prefill(self, prompts: list[list[int]], pad_id: int, k: int) -> Float[Tensor, "row vocabulary"]:
        """Logits after each prompt, `k` rows a prompt; every prompt is computed once."""
        length = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (length - len(prompt)) + prompt for prompt in prompts], device=self.device)
        # without padding there is no mask at all: attention is faster, and the very one of the training forward
        if any(len(prompt) < length for prompt in prompts):
            pads = torch.tensor([length - len(prompt) for prompt in prompts], device=self.device)
            self.mask = torch.arange(length, device=self.device) >= pads[:, None]
        logits = self._forward(ids)
        self.cache.batch_repeat_interleave(k)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(k, 0)
        return logits.repeat_interleave(k, 0)

    def step(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocabulary"]:
        """Logits after one more token in each row."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        return self._forward(tokens[:, None])

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Forget all rows but these."""
        self.cache.batch_select_indices(rows)
        self.mask = None if self.mask is None else self.mask[rows]

    def _forward(self, ids: Int[Tensor, "row new"]) -> Float[Tensor, "row vocabulary"]:
        positions = None
        if self.mask is not None:
            positions = (self.mask.cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        output = self.body(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.head(output.last_hidden_state[:, -1])


@torch.inference_mode()
def _sample_batch(
    policy: Policy,
    prompts: list[list[int]],
    k: int,
    uniforms: Float[Tensor, "row step"] | None,
    sampling: Sampling,
) -> list[Sample]:
    """`k` samples of each prompt in order."""
    decoder = _Decoder(policy)
    logits = decoder.prefill(prompts, policy.tokenizer.pad_token_id, k)
    record = _Record(policy, prompts, k, sampling)
    uniforms = None if uniforms is None else uniforms.to(decoder.device)
    for step in range(sampling.max_new):
        numbers = None if uniforms is None else uniforms[record.rows, step]
        tokens, log_probs = draw(logits, numbers, sampling)
        record.add(step, tokens, log_probs)
        if step + 1 == sampling.max_new or record.all_ended:
            break
        rows = record.compact()
        if rows is not None:
            decoder.keep(rows)
            tokens = tokens[rows]
        logits = decoder.step(tokens)
    return record.samples()


class _Record:
    """What has been sampled so far. `rows` are the responses still in the batch, some of them already ended."""

    def __init__(self, policy: Policy, prompts: list[list[int]], k: int, sampling: Sampling):
        device, count = policy.device, len(prompts) * k
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(k)
        self.room = (policy.context - lengths).clamp_(max=sampling.max_new)
        self.stops = torch.tensor(policy.stop_ids, device=device)
        self.ids = torch.zeros(count, sampling.max_new, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(count, sampling.max_new, device=device)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.rows = torch.arange(count, device=device)
        self.alive = torch.ones(count, dtype=torch.bool, device=device)

    def add(self, step: int, tokens: Int[Tensor, " row"], log_probs: Float[Tensor, " row"]) -> None:
        """Write one token per row; what an ended row still receives lies beyond its length."""
        self.ids[self.rows, step], self.log_probs[self.rows, step] = tokens, log_probs
        stopped = torch.isin(tokens, self.stops)
        self.lengths[self.rows] += self.alive
        self.finished[self.rows] |= stopped & self.alive
        self.alive = self.alive & ~stopped & (step + 1 < self.room[self.rows])

    @property
    def all_ended(self) -> bool:
        return not bool(self.alive.any())

    def compact(self) -> Int[Tensor, " kept"] | None:
        """Drop the ended rows and say which stayed; None while they are too few to be worth it."""
        kept = self.alive.nonzero()[:, 0]
        if len(kept) > (1 - COMPACT_AT) * len(self.rows):
            return None
        self.rows, self.alive = self.rows[kept], self.alive[kept]
        return kept

    def samples(self) -> list[Sample]:
        columns = (values.tolist() for values in (self.ids, self.log_probs, self.lengths, self.finished))
        return [Sample(ids[:n], done, log_probs[:n]) for ids, log_probs, n, done in zip(*columns)]
