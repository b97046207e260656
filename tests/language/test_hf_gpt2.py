"""transformers' GPT-2 and ours are one network, read and written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_modules.language import hf_gpt2
from lightning_modules.language.hf_gpt2 import load, save
from tests.language.test_gpt2 import tokens, toy, trained_like


def theirs(folder, **options):
    """A checkpoint with random weights, as large as trained ones."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=32, n_layer=3, n_head=4, n_embd=48, **options)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "gelu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"n_inner": 192, "activation_function": "gelu_pytorch_tanh"},
    ],
    ids=lambda options: "-".join(options) or "gpt2",
)
def test_a_checkpoint_has_its_logits(tmp_path, options):
    model, ids = theirs(tmp_path, **options), tokens()[0]
    torch.testing.assert_close(load(tmp_path).eval()(ids), model(ids).logits, rtol=1e-6, atol=1e-5)


def test_the_two_gelus_are_not_each_other(tmp_path):
    model, ids = theirs(tmp_path), tokens()[0]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"activation_function": "gelu"}))
    difference = (load(tmp_path).eval()(ids) - model(ids).logits).abs().max().item()
    assert 1e-5 < difference < 0.1


def test_the_hub_s_old_names_and_shards_are_read(tmp_path):
    """OpenAI's weights on the hub lack the prefix and have the masks as buffers; large models come in parts."""
    model, ids = theirs(tmp_path), tokens()[0]
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    names = sorted(tensors)
    for number, part in enumerate((names[:10], names[10:]), 1):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    file.unlink()
    torch.testing.assert_close(load(tmp_path).eval()(ids), model(ids).logits, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "gelu": "tanh", "scale_by_layer": True}, {"tied": False}],
    ids=["gpt2", "bare", "untied"],
)
def test_what_is_written_has_our_logits_in_transformers(tmp_path, options):
    network, ids = trained_like(toy(**options)).eval(), tokens()[0]
    save(network, tmp_path / "export")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == 97
    torch.testing.assert_close(model.eval()(ids).logits, network(ids)[..., :97], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(load(tmp_path / "export").eval()(ids), network(ids)[..., :97], rtol=1e-6, atol=1e-5)
    assert sorted(file.name for file in (tmp_path / "export").iterdir()) == ["config.json", "model.safetensors"]


class Words:
    """A tokenizer that only has files."""

    bos_token_id = eos_token_id = 3

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def save_pretrained(self, folder) -> None:
        if self.fails:
            raise OSError("no space left on device")
        (folder / "tokenizer.json").write_text("{}")


def test_the_tokenizer_lies_beside_the_weights_and_old_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save(toy(), tmp_path, Words())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "notes.txt", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3


def test_a_failed_save_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    network, ids = trained_like(toy()).eval(), tokens()[0]
    save(network, tmp_path)
    with pytest.raises(OSError, match="no space left"):
        save(toy(layers=1), tmp_path, Words(fails=True))
    torch.testing.assert_close(load(tmp_path).eval()(ids), network(ids)[..., :97], rtol=1e-6, atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "options", [{"norm": "rms"}, {"mlp": "relu2"}, {"position": "rotary"}, {"qk_norm": True}, {"softcap": 15.0}]
)
def test_what_transformers_gpt2_cannot_express_is_refused(tmp_path, options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"a network with {name}={value} cannot be written for transformers"):
        save(toy(**options), tmp_path / "export")
    assert not (tmp_path / "export").exists()


# ---- bad checkpoints


def changed(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "llama"}, "model_type='llama', which this network cannot be: it takes 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_inner": 100}, "n_inner=100"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_layer": 4}, "has no tensor h.3.ln_1.weight"),
        ({"vocab_size": 98}, r"wte.weight has the shape \(97, 48\), which does not fit config.json"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, values, said):
    theirs(tmp_path)
    changed(tmp_path, **values)
    with pytest.raises(ValueError, match=said):
        load(tmp_path)


def test_a_missing_folder_and_a_folder_without_a_config_are_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{folder}/config.json is missing"):
            load(folder)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    theirs(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="is no JSON object"):
            load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    model = theirs(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only pickled weights, which are not read"):
        load(tmp_path)


def test_a_cut_off_file_is_refused(tmp_path):
    theirs(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_one_sentence(monkeypatch, tmp_path):
    """Without a network, and at once."""
    monkeypatch.setattr(hf_gpt2, "HfApi", Unreachable)
    with pytest.raises(ConnectionError, match=r"'nobody/no-model' is no folder here, .* \(no route to host\)"):
        load("nobody/no-model")


class Unreachable:
    """The hub where there is no network."""

    def model_info(self, name: str, timeout: float) -> None:
        raise OSError("no route to host")
