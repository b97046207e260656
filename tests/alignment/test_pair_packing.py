"""Pairs that share their prompts and their rows say what they say in rows of their own."""

import random

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from datamodules.batches import Pair
from datamodules.collation import preference_batch
from datamodules.pair_packing import packed_preference_batch
from lightning_modules.alignment.policies import tiny
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer
from tests.alignment.test_preference import method


def pairs(count: int = 9) -> list[Pair]:
    generator = random.Random(0)
    draw = lambda: [generator.randrange(2, 495) for _ in range(generator.randrange(1, 40))]  # noqa: E731
    found = []
    for i in range(count):
        responses = (draw(), draw())
        lp_ref = tuple([generator.uniform(-9, 0) for _ in response] for response in responses)
        value = (generator.random(), generator.random())
        found.append(Pair(f"p{i}", draw(), responses, generator.random(), value, lp_ref))
    return found


def gpt2() -> Policy:
    return Policy(GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=16, n_layer=2, n_head=2)), tiny_tokenizer())


def test_a_prompt_is_there_once_and_its_last_token_before_each_response():
    pair = Pair("p", [7, 8, 9], ([4, 1], [5, 6, 1]), 1.0, None, ([-1.0, -2.0], [-3.0, -4.0, -5.0]))
    batch = packed_preference_batch([pair], 0, 5.0, multiple=4, room=100)
    assert batch["ids"].tolist() == [[7, 8, 9, 4, 1, 9, 5, 6, 1]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert batch["branch"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert batch["mask"].nonzero()[:, 1].tolist() == [2, 3, 5, 6, 7]
    assert batch["lp_ref"].tolist() == [[0, 0, -1, -2, 0, -3, -4, -5]]
    assert batch["token_share"] == 5
    assert "value" not in batch


@pytest.mark.parametrize("room", [1, 150, 2000], ids=["a pair a row", "a few", "one row"])
@pytest.mark.parametrize("make", [tiny, gpt2], ids=["llama", "gpt2"])
def test_sums_and_gradients_are_those_of_rows_of_their_own(make, room):
    one = method(policy=make().train())
    with torch.no_grad():
        one.policy.causal_lm.get_output_embeddings().weight.mul_(5)
    results = []
    for batch in (packed_preference_batch(pairs(), 0, 1.0, 1, room), preference_batch(pairs(), 0, 1.0)):
        one.zero_grad()
        compared = one.compare(batch)
        loss = one.losses(*compared.log_ratios.unbind(1), batch, compared.lengths).mean()
        loss.backward()
        results.append([loss.detach(), batch["value"], *(x.detach() for x in compared)])
        results[-1] += [parameter.grad for parameter in one.policy.parameters()]
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)


def test_packing_leaves_out_padding_and_the_second_prompt():
    packed, padded = packed_preference_batch(pairs(), 0, 1.0, 1, 512), preference_batch(pairs(), 0, 1.0)
    needed = sum(len(pair.prompt_ids) + 1 + sum(map(len, pair.responses)) for pair in pairs())
    assert int((packed["branch"] >= 0).sum()) == needed
    assert packed["ids"].numel() < 0.75 * padded["ids"].numel()
    assert packed["mask"].sum() == padded["mask"].sum()


def test_architectures_that_do_not_keep_branches_apart_are_refused():
    tiny().check_sharing()
    gpt2().check_sharing()
    bloom = Policy(BloomForCausalLM(BloomConfig(vocab_size=600, hidden_size=16, n_head=2)), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"BloomForCausalLM does not keep .*data\.packed=false"):
        bloom.check_sharing()
