"""Sequences that share a row score as in rows of their own, and what cannot keep them apart is refused."""

import random

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from datamodules.collation import packed_batch, token_batch
from lightning_modules.alignment.policies import pretrained, tiny
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer
from tessera.check import problems
from tessera.compose import compose


def sequences(count: int = 12) -> list[tuple[list[int], list[int]]]:
    generator = random.Random(0)
    draw = lambda: [generator.randrange(2, 595) for _ in range(generator.randrange(1, 60))]  # noqa: E731
    return sorted([(draw(), draw()) for _ in range(count)], key=lambda row: -len(row[0] + row[1]))


def gpt2() -> Policy:
    return Policy(GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=16, n_layer=2, n_head=2)), tiny_tokenizer())


@pytest.mark.parametrize("make", [tiny, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("room", [300, 1000], ids=["a few rows", "one row"])
def test_log_probs_and_gradients_are_those_of_unpacked_rows(make, room):
    policy, results = make().train(), []
    for batch in (packed_batch(sequences(), 0, 1.0, 1, room), token_batch(sequences(), 0, 1.0)):
        policy.zero_grad()
        log_probs = policy(batch["ids"], batch["mask"], batch.get("positions")).log_probs[batch["mask"]]
        (log_probs.sum() / len(log_probs)).backward()
        gradients = [parameter.grad.clone() for parameter in policy.parameters()]
        results.append([log_probs.detach().sort().values, *gradients])
    assert len(batch["ids"]) == 12
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_the_order_in_a_row_does_not_matter_and_a_lost_boundary_does():
    policy, rows = tiny(), sequences(3)
    with torch.no_grad():
        policy.causal_lm.lm_head.weight.mul_(20)
    alone = [policy(b["ids"], b["mask"]).log_probs.sum() for b in (token_batch([row], 0, 1.0) for row in rows)]
    batch = packed_batch(rows, 0, 1.0, 1, 1000)
    torch.testing.assert_close(policy(batch["ids"], batch["mask"], batch["positions"]).log_probs.sum(), sum(alone))
    assert (policy(batch["ids"], batch["mask"]).log_probs.sum() - sum(alone)).abs() > 1


def test_architectures_that_do_not_keep_sequences_apart_are_refused():
    tiny().check_packing()
    gpt2().check_packing()
    opt = OPTConfig(vocab_size=600, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
                    word_embed_proj_dim=16)  # fmt: skip
    for model in (OPTForCausalLM(opt), BloomForCausalLM(BloomConfig(vocab_size=600, hidden_size=16, n_head=2))):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} does not keep .*data\.packed=false"):
            Policy(model, tiny_tokenizer()).check_packing()


def test_a_packed_adapted_policy_keeps_sequences_apart(tmp_path):
    pytest.importorskip("peft")
    tiny().export(tmp_path / "base")
    pretrained(str(tmp_path / "base"), lora={"r": 4, "alpha": 8}).check_packing()


@pytest.mark.parametrize("model", ["dqo", "kto", "rft"])
def test_a_method_that_needs_a_row_for_every_sequence_refuses_packed_ones(model):
    config, choices = compose([f"model={model}", "data.packed=true"])
    assert problems(config, choices) == [
        f"data.packed=true: model={model} needs a row for every sequence; take data.packed=false"
    ]
    assert problems(*compose(["model=sft", "data.packed=true"])) == []
