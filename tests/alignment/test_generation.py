"""Sampling is exact (against transformers, against no cache), reproducible, and says with what probability it drew."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lightning_modules.alignment.generation import Sampling, batches, draw, generate
from lightning_modules.alignment.policies import tiny
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer

TRUNCATED = Sampling(temperature=0.7, top_p=0.9, top_k=16, max_new=30, seed=3)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Random weights with a peaked distribution, so that greedy is decided and truncation cuts something."""
    policy = tiny()
    head = policy.causal_lm.lm_head
    with torch.no_grad():
        head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.fixture(scope="module")
def stopping(policy) -> Policy:
    """The same, ending a response after some twenty tokens."""
    return with_end_bias(policy.frozen(), 6.3)


def with_end_bias(policy: Policy, value: float) -> Policy:
    """Make the logit of the end token a constant: random weights hardly ever stop."""
    head = policy.causal_lm.lm_head
    with torch.no_grad():
        head.weight[1] = 0
    bias = torch.zeros(head.out_features)
    bias[1] = value
    head.bias = torch.nn.Parameter(bias)
    return policy


def ragged(count: int, low: int = 3, high: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(2, 595, (length,), generator=generator).tolist() for length in lengths]


def run(policy: Policy, *args, **kwargs) -> list:
    samples = dict(generate(policy, *args, **kwargs))
    return [samples[position] for position in range(len(samples))]


def tokens(results: list) -> list:
    return [[sample.ids for sample in samples] for samples in results]


def naive_log_probs(policy: Policy, prompt: list[int], response: list[int], sampling: Sampling) -> list[float]:
    """Token by token, without cache: temperature, then the top k, then the nucleus, as a loop over ranked tokens."""
    result = []
    for step, token in enumerate(response):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + response[:step]])).logits[0, -1].double()
        ranked = sorted(enumerate((logits / sampling.temperature).tolist()), key=lambda pair: -pair[1])
        ranked = [(index, math.exp(value - ranked[0][1])) for index, value in ranked[: sampling.top_k or None]]
        total, kept, reached = sum(weight for _, weight in ranked), {}, 0.0
        for index, weight in ranked:
            if reached >= sampling.top_p * total:
                break
            kept[index], reached = weight, reached + weight
        result.append(math.log(kept[token] / sum(kept.values())))
    return result


def test_greedy_equals_transformers_and_no_cache(policy):
    prompts = ragged(20)
    ours = run(policy, prompts, 1, Sampling(temperature=0, max_new=25))
    for prompt, (sample,) in zip(prompts, ours):
        theirs = policy.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=25)
        ids = list(prompt)
        while len(ids) < len(prompt) + len(sample.ids):
            ids.append(int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert sample.ids == theirs[0, len(prompt) :].tolist() == ids[len(prompt) :]
        assert sample.log_probs == [0.0] * len(sample.ids)
    assert len({token for (sample,) in ours for token in sample.ids}) > 50  # not a degenerate model


def test_greedy_ends_where_transformers_ends(stopping):
    prompts = ragged(12)
    ours = run(stopping, prompts, 1, Sampling(temperature=0, max_new=60))
    for prompt, (sample,) in zip(prompts, ours):
        theirs = stopping.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60)
        assert sample.ids == theirs[0, len(prompt) :].tolist()
        assert sample.finished == (sample.ids[-1] == 1)
    assert any(sample.finished for (sample,) in ours)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new=30),
        Sampling(temperature=0.7, max_new=30),
        Sampling(top_p=0.8, max_new=30),
        Sampling(top_k=5, max_new=30),
        TRUNCATED,
    ],
    ids=["plain", "temperature", "top_p", "top_k", "all"],
)
def test_log_probs_are_those_of_the_sampler(stopping, sampling):
    prompts = ragged(6)
    worst = 0.0
    for prompt, samples in zip(prompts, run(stopping, prompts, 2, sampling)):
        for sample in samples:
            expected = naive_log_probs(stopping, prompt, sample.ids, sampling)
            worst = max(worst, *(abs(a - b) for a, b in zip(sample.log_probs, expected, strict=True)))
    assert worst < 1e-4


def test_left_padding_changes_nothing(stopping):
    prompts = ragged(16)
    together = run(stopping, prompts, 2, TRUNCATED)
    for position, prompt in enumerate(prompts):
        ((_, alone),) = generate(stopping, [prompt], 2, TRUNCATED, keys=[str(position)])
        for mine, other in zip(together[position], alone):
            assert mine.ids == other.ids
            torch.testing.assert_close(mine.log_probs, other.log_probs, rtol=1e-4, atol=1e-5)


def test_batches_order_and_sharing_do_not_change_the_samples(stopping):
    prompts, keys = ragged(24), [f"row-{row}" for row in range(24)]
    sampling = Sampling(max_new=40)
    expected = tokens(run(stopping, prompts, 3, sampling, keys))
    for batch_rows in (1, 7, 30):
        assert tokens(run(stopping, prompts, 3, sampling, keys, batch_rows=batch_rows)) == expected
    assert tokens(run(stopping, prompts[::-1], 3, sampling, keys[::-1]))[::-1] == expected
    halves = [tokens(run(stopping, prompts[rank::2], 3, sampling, keys[rank::2])) for rank in (0, 1)]
    assert [halves[row % 2][row // 2] for row in range(24)] == expected


def test_a_longer_limit_continues_the_same_responses(stopping):
    prompts = ragged(8)
    short, long = (run(stopping, prompts, 2, Sampling(max_new=limit)) for limit in (10, 40))
    for brief, whole in zip(short, long):
        assert all(a.ids == b.ids[:10] for a, b in zip(brief, whole))


def test_the_samples_of_a_prompt_and_of_two_seeds_differ(policy):
    first, second = (run(policy, ragged(2), 4, Sampling(max_new=8, seed=seed)) for seed in (0, 1))
    drawn = [tuple(sample.ids) for samples in first + second for sample in samples]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("sampling", [Sampling(max_new=1), Sampling(temperature=0.6, top_k=5, max_new=1)])
def test_frequencies_match_the_softmax(sampling):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1)
    policy, count = Policy(model, tiny_tokenizer()), 4000
    ((_, samples),) = generate(policy, [[3, 4, 5]], count, sampling)
    observed = torch.bincount(torch.tensor([sample.ids[0] for sample in samples]), minlength=8)
    logits = model(torch.tensor([[3, 4, 5]])).logits[0, -1] / sampling.temperature
    if sampling.top_k:
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    expected = logits.softmax(-1) * count
    possible = expected > 0
    assert not observed[~possible].any()
    # 24.3 is the 99.9 % quantile for seven degrees of freedom
    assert ((observed - expected)[possible] ** 2 / expected[possible]).sum() < 24.3


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    drawn, log_probs = draw(logits, uniforms, Sampling())
    assert drawn.tolist() == [1, 1, 3, 3, 3]
    torch.testing.assert_close(log_probs, torch.full((5,), math.log(0.5)))


def test_a_nucleus_smaller_than_the_likeliest_token_is_greedy(policy):
    prompts = ragged(5)
    greedy = run(policy, prompts, 1, Sampling(temperature=0, max_new=10))
    nucleus = run(policy, prompts, 1, Sampling(top_p=1e-6, max_new=10))
    assert tokens(greedy) == tokens(nucleus)


def test_a_sliding_window_is_respected():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, max_position_embeddings=128,
    )  # fmt: skip
    policy = Policy(MistralForCausalLM(config), tiny_tokenizer())
    with torch.no_grad():
        policy.causal_lm.lm_head.weight.normal_(0, 0.5)
    prompts = [[5, 6, 7], [8] * 9, [9, 10, 11, 12, 13, 14, 15]]
    for prompt, (sample,) in zip(prompts, run(policy, prompts, 1, Sampling(temperature=0, max_new=20))):
        ids = list(prompt)
        for _ in sample.ids:
            ids.append(int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert sample.ids == ids[len(prompt) :]


def test_the_context_ends_a_response_unfinished():
    policy = with_end_bias(tiny(context=24), -1e4)
    prompts = [[5] * 10, [6] * 20, [7] * 23]
    results = run(policy, prompts, 1, Sampling(temperature=0, max_new=110))
    assert [len(prompt) + len(sample.ids) for prompt, (sample,) in zip(prompts, results)] == [24, 24, 24]
    assert not any(sample.finished for (sample,) in results)


@pytest.mark.parametrize("length", [0, 24])
def test_a_prompt_without_room_is_refused_by_position(length):
    with pytest.raises(ValueError, match=f"Prompt 1 has {length} tokens; the policy's context of 24 takes 1 to 23"):
        next(generate(tiny(context=24), [[5], [5] * length], 1, Sampling()))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new": 0}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"sampling.{next(iter(wrong))} is"):
        Sampling(**wrong)


def test_batches_hold_similar_lengths_and_every_position_once():
    lengths = [5, 30, 6, 29, 7, 28]
    assert batches(lengths, 4, 8) == [[0, 2], [4, 5], [3, 1]]
    assert batches(lengths, 99, 8) == [[0], [2], [4], [5], [3], [1]]


def test_training_mode_and_global_random_state_are_left_as_they_were(policy):
    policy.train()
    state = torch.get_rng_state()
    run(policy, ragged(2), 1, Sampling(max_new=3))
    assert policy.training
    assert torch.equal(torch.get_rng_state(), state)
