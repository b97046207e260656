"""The datamodule: what it refuses at once, what its loaders give on any number of processes, how text comes back."""

import importlib.util
import math
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from datamodules.batches import WindowBatch
from datamodules.shards import GPT2, Stream, write_llmc, write_nanogpt
from datamodules.text import Text
from tessera.compose import CONF

TEXT = "The quick brown fox — naïve as ever — jumps.\n" * 200
TOKENS = np.random.default_rng(0).integers(1_000, size=5_000).astype(np.uint16)


@pytest.fixture
def made(tmp_path):
    """`made(key=value, ...)` is the datamodule of conf/data/text.yaml with these values."""

    def made(**changes) -> Text:
        config = OmegaConf.merge(
            {"seed": 1, "output": str(tmp_path / "outputs")}, OmegaConf.load(CONF / "data/text.yaml")
        )
        config.data.update({key: str(value) if key == "path" else value for key, value in changes.items()})
        return hydra.utils.get_class(config.data._target_)(
            **{
                key: value
                for key, value in OmegaConf.to_container(config.data, resolve=True).items()
                if key != "_target_"
            }
        )

    return made


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    write_llmc(folder / "x_train_000001.bin", Stream([TOKENS]))
    write_llmc(folder / "x_val_000000.bin", Stream([TOKENS[:700]]))
    return folder


def at(data: Text, rank: int = 0, world: int = 1, accumulate: int = 1, step: int = 0) -> Text:
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world, accumulate_grad_batches=accumulate, global_step=step
    )
    return data


def test_the_standin_is_served_as_windows_of_bytes(made):
    data = at(made())
    assert Text.serves == (WindowBatch,)
    assert (data.name, data.standin, data.vocab_size) == ("text-standin", True, 256)
    assert data.source.origin == "source of Python's standard library"
    batch = next(iter(data.train_dataloader()))
    assert batch["ids"].shape == (16, 65)
    assert batch["token_share"] == 16 * 64
    assert data.bytes_per_token("val") == 1.0
    assert 3.0 < data.unigram_entropy("val") < 3.3


def test_text_comes_back(made, text):
    for tokenizer in ("bytes", "gpt2"):
        data = made(path=text, tokenizer=tokenizer)
        assert data.decode(data.encode(TEXT)) == TEXT
        assert TEXT.startswith(data.decode(data.parts["train"].read(0, 20).tolist())[:15])


def test_bytes_per_token_is_exact(made, text):
    data = made(path=text, tokenizer="gpt2")
    size = sum(data.bytes_per_token(part) * len(data.source.parts[part]) for part in ("train", "val"))
    assert round(size) == len(TEXT.encode())


def test_unigram_entropy_of_known_shares(made, tmp_path):
    (tmp_path / "a.txt").write_text("aaab" * 1_000)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert math.isclose(made(path=tmp_path / "a.txt").unigram_entropy("val"), expected, rel_tol=1e-12)


def test_tokens_of_shards_are_those_of_gpt2_unless_something_else_is_said(made, shards):
    data = made(path=shards)
    assert (data.vocab_size, data.end, data.tokenizer.name) == (50_257, 50_256, "gpt2")
    assert data.bytes_per_token("val") > 1
    assert made(path=shards, vocab_size=1_024).vocab_size == 1_024
    assert made(path=shards, vocab_size=1_024).decode([15496, 995]) == "Hello world"


def test_without_gpt2s_files_tokens_can_still_be_learned(made, shards, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = made(path=shards)
    assert data.vocab_size == 50_257
    assert data.bytes_per_token("val") is None
    assert data.decode([1, 20]) == "1 20"


def test_tokenizer_files_that_are_not_there_are_refused_at_once(made, shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer_files"):
        made(path=shards, tokenizer_files=str(tmp_path))


def test_a_token_beyond_the_vocabulary_is_named_with_its_file(made, shards):
    largest = int(TOKENS.max())
    assert made(path=shards, vocab_size=largest + 1).vocab_size == largest + 1
    with pytest.raises(
        ValueError, match=rf"x_train_000001\.bin has the token {largest}, beyond a vocabulary of {largest}"
    ):
        made(path=shards, vocab_size=largest)
    with pytest.raises(ValueError, match=f"has the token {largest}, beyond a vocabulary of 256"):
        made(path=shards, tokenizer="bytes")
    with pytest.raises(ValueError, match="beyond a vocabulary of 100"):
        made(vocab_size=100)


def test_what_is_shorter_than_a_window_is_refused(made, shards, text):
    assert made(path=shards, context=699)
    with pytest.raises(ValueError, match=r"the val part has 700 tokens, and a window of data\.context=700 needs 701"):
        made(path=shards, context=700)
    with pytest.raises(ValueError, match=r"the (val|test) part has \d+ tokens"):
        made(path=text, context=1_000)


@pytest.mark.parametrize("key", ["context", "batch_size", "hub_tokens"])
def test_sizes_must_be_positive(made, key):
    with pytest.raises(ValueError, match=rf"data\.{key}=0 must be positive"):
        made(**{key: 0})


@pytest.mark.parametrize("key", ["document_mask", "align"])
def test_documents_need_a_token_between_them(made, shards, text, key):
    with pytest.raises(ValueError, match=rf"data\.{key}=true needs an end-of-text token"):
        made(path=text, **{key: True})
    batch = next(iter(at(made(path=shards, **{key: True})).train_dataloader()))
    assert ("positions" in batch) == (key == "document_mask")


def test_limits_are_kept(made, shards):
    data = made(path=shards, limit=10)
    assert {part: len(stream) for part, stream in data.parts.items()} == {"train": 641, "val": 641, "test": 641}
    data = at(made(path=shards, eval_tokens=130))
    assert {part: len(stream) for part, stream in data.parts.items()} == {"train": 5_000, "val": 131, "test": 131}
    assert sum(int(batch["mask"].sum()) for batch in data.val_dataloader()) == 130


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (2, 2), (4, 1)])
def test_loaders_agree_on_any_number_of_processes(made, shards, world, accumulate):
    whole = list(at(made(path=shards), step=1).train_dataloader())
    parts = [list(at(made(path=shards), rank, world, accumulate, 1).train_dataloader()) for rank in range(world)]
    for step, batch in enumerate(whole):
        micro = [part[step * accumulate + i] for i in range(accumulate) for part in parts]
        assert (torch.stack([m["ids"] for m in micro], 1).flatten(0, 1) == batch["ids"]).all()
        assert sum(float(m["token_share"]) for m in micro) == batch["token_share"]
    counted = [
        sum(int(b["mask"].sum()) for b in at(made(path=shards), rank, world).val_dataloader()) for rank in range(world)
    ]
    assert sum(counted) == 699


def test_workers_give_what_one_process_gives(made, shards):
    with_workers = list(at(made(path=shards, workers=2), step=1).train_dataloader())
    alone = list(at(made(path=shards), step=1).train_dataloader())
    assert len(alone) == len(with_workers) == 76 // 16 - 1
    assert all((a["ids"] == b["ids"]).all() for a, b in zip(with_workers, alone))


def test_loaders_leave_the_generator_of_the_run_alone(made, shards):
    data = at(made(path=shards))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        next(iter(loader))
    assert (torch.rand(3) == expected).all()


def test_the_fingerprint_is_that_of_the_content(made, shards):
    before = made(path=shards).fingerprint
    assert before == made(path=shards).fingerprint
    write_llmc(shards / "x_val_000000.bin", Stream([TOKENS[1:701]]), GPT2)
    assert made(path=shards).fingerprint != before


def test_nanogpt_files_are_served(made, tmp_path):
    for part in ("train", "val"):
        write_nanogpt(tmp_path / "set" / f"{part}.bin", Stream([TOKENS]))
    assert {part: len(stream) for part, stream in made(path=tmp_path / "set").parts.items()} == {
        "test": 5_000, "train": 5_000, "val": 5_000,
    }  # fmt: skip
