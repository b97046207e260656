"""A converted Llama says what the Llama says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_modules.language.sampling import generate
from lightning_modules.language.t6 import T6
from tools.convert_gqa_to_tpa import convert

IDS = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(0))
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def llama(folder: Path, **changes) -> LlamaForCausalLM:
    """A small random one, with gains that are not 1."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 36, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes | heads | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter) if "norm" in name else 8 * parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-2, "rope_parameters": ROPE | {"rope_theta": 500.0}},
    ],
    ids=["gqa", "mha-tied", "mqa"],
)
def test_logits_are_the_same(tmp_path, changes):
    theirs, ours = llama(tmp_path, **changes), convert(tmp_path)
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert expected.std() > 0.5
    groups = theirs.config.num_key_value_heads
    assert ours.cache_bytes_per_token(torch.bfloat16) == 2 * 2 * 2 * groups * 8


def test_generation_is_the_same(tmp_path):
    theirs, ours = llama(tmp_path), convert(tmp_path)
    expected = theirs.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(ours, IDS, 12, temperature=0.0), expected)


def test_the_command_writes_what_loads(tmp_path):
    theirs = llama(tmp_path / "llama")
    done = run(tmp_path / "llama", tmp_path / "t6")
    assert done.returncode == 0, done.stderr
    assert "2 layers, 128 bytes of bfloat16 cache per token" in done.stdout
    with torch.no_grad():
        torch.testing.assert_close(T6.load(tmp_path / "t6")(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_converted_is_one_sentence(tmp_path):
    scaled = ROPE | {"rope_type": "linear", "factor": 2.0}
    refusals = {"attention_bias=True": {"attention_bias": True}, "rope_type='linear'": {"rope_parameters": scaled}}
    for number, (said, changes) in enumerate(refusals.items()):
        llama(tmp_path / str(number), **changes)
        with pytest.raises(ValueError, match=said):
            convert(tmp_path / str(number))
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model_type='gpt2', and T6 can only be model_type='llama'"):
        convert(tmp_path / "gpt2")
    done = run(tmp_path / "nothing", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def run(source: Path, output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.convert_gqa_to_tpa", str(source), "-o", str(output)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=offline, capture_output=True, text=True)
