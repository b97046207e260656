"""The authors' weights: read by their names, refused when they are of another network or run code."""

import re

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.cryo import published
from tests.cryo.test_hdit import awake, toy

# every kind of name in the authors' HDiT (core/models/hdit), with two levels and a depth of one
LAYER = (
    *("self_attn.norm.linear.weight", "self_attn.qkv_proj.weight", "self_attn.scale", "self_attn.pos_emb.freqs"),
    *("self_attn.out_proj.weight", "ff.norm.linear.weight", "ff.up_proj.weight", "ff.down_proj.weight"),
)
NAMES = {
    *("patch_in.proj.weight", "time_emb.weight", "time_in_proj.weight", "out_norm.scale", "patch_out.proj.weight"),
    *("merges.0.proj.weight", "splits.0.proj.weight", "splits.0.fac"),
    *(f"{level}.{name}" for level in ("down_levels.0.0", "up_levels.0.0", "mid_level.0") for name in LAYER),
}


@pytest.fixture
def theirs() -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(value) for name, value in toy().state_dict().items()}


def test_our_names_are_the_authors_names(theirs):
    assert set(theirs) == NAMES


def test_weights_are_read_from_safetensors_and_checkpoints_alike(theirs, tmp_path):
    save_file(theirs, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"model.{name}": value for name, value in theirs.items()}}, tmp_path / "model.ckpt")
    for file in ("model.safetensors", "model.ckpt"):
        network = toy()
        published.load(network, tmp_path / file)
        assert torch.equal(network.patch_in.proj.weight, theirs["patch_in.proj.weight"])


def test_their_time_is_counted_in_thousandths(theirs, tmp_path):
    save_file(theirs, tmp_path / "model.safetensors")
    network = toy()
    published.load(network, tmp_path / "model.safetensors")
    angle = 2 * torch.pi * 300 * theirs["time_emb.weight"][:, 0]
    torch.testing.assert_close(network.time_emb(torch.tensor([0.3]))[0, :8], angle.cos(), rtol=0, atol=1e-3)


def test_the_exponential_mean_is_taken_where_there_is_one(theirs, tmp_path):
    mean = {f"model_ema.{name.replace('.', '__')}": value + 1 for name, value in theirs.items() if "emb" not in name}
    counters = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    raw = {f"model.{name}": value for name, value in theirs.items()}
    torch.save({"state_dict": raw | mean | counters}, tmp_path / "last.ckpt")
    network = toy()
    published.load(network, tmp_path / "last.ckpt")
    assert torch.equal(network.mid_level[0].ff.up_proj.weight, theirs["mid_level.0.ff.up_proj.weight"] + 1)
    assert torch.equal(network.mid_level[0].self_attn.pos_emb.freqs, theirs["mid_level.0.self_attn.pos_emb.freqs"])


def test_weights_of_another_network_are_refused_by_name(theirs, tmp_path):
    save_file(theirs, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape("another network: patch_in.proj.weight is (24, 8) there")):
        published.load(toy(widths=(36, 48)), tmp_path / "model.safetensors")


def test_code_damage_and_absence_are_refused(tmp_path):
    torch.save({"state_dict": {}, "run": awake}, tmp_path / "code.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for name, words in {"code.ckpt": "without running code", "cut.safetensors": "is damaged"}.items():
        with pytest.raises(ValueError, match=words):
            published.load(toy(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is no file"):
        published.load(toy(), tmp_path / "absent.safetensors")
