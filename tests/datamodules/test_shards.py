"""Both formats of token files are read as they were written; whatever is wrong with one is said in a sentence."""

import pickle
import random
from itertools import pairwise

import numpy as np
import pytest

from datamodules.shards import (
    GPT2,
    HEADER,
    HEADER_BYTES,
    LLAMA3,
    Shard,
    Stream,
    appearing_whole,
    largest,
    open_shard,
    write_llmc,
    write_nanogpt,
)

TOKENS = np.random.default_rng(0).integers(50_257, size=5_000).astype(np.uint16)


def write(path, *, magic=GPT2, version=1, count=None, tokens=TOKENS, order="<"):
    header = np.zeros(HEADER, f"{order}i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype(f"{order}u2").tobytes())
    return path


def test_a_nanogpt_file_is_the_tokens_and_nothing_else(tmp_path):
    path = write_nanogpt(tmp_path / "train.bin", Stream([TOKENS]))
    assert path.read_bytes() == TOKENS.astype("<u2").tobytes()
    shard = open_shard(path)
    assert (shard.offset, len(shard)) == (0, 5_000)
    assert (shard.open() == TOKENS).all()


def test_an_llmc_shard_has_its_header_before_the_tokens(tmp_path):
    path = write_llmc(tmp_path / "x_train_000001.bin", Stream([TOKENS]))
    assert path.read_bytes() == write(tmp_path / "by_hand.bin").read_bytes()
    shard = open_shard(path)
    assert (shard.offset, len(shard), shard.vocab_size) == (HEADER_BYTES, 5_000, 50_257)
    assert (shard.open() == TOKENS).all()


def test_llama_3_shards_have_four_bytes_a_token(tmp_path):
    tokens = np.array([128_000, 7, 128_255], np.uint32)
    shard = open_shard(write_llmc(tmp_path / "x_val_000000.bin", Stream([tokens]), LLAMA3))
    assert shard.open().tolist() == tokens.tolist()
    assert (shard.vocab_size, largest(shard)) == (128_256, 128_255)


def test_a_stream_reads_across_its_pieces(tmp_path):
    cuts = [0, 10, 11, 1_000, 5_000]
    pieces = [TOKENS[a:b] for a, b in pairwise(cuts)]
    files = [open_shard(write_llmc(tmp_path / f"{i}.bin", Stream([piece]))) for i, piece in enumerate(pieces)]
    for stream in (Stream(pieces), Stream(files), pickle.loads(pickle.dumps(Stream(files)))):
        assert len(stream) == 5_000
        for begin, end in [(0, 1), (0, 10), (9, 12), (5, 1_001), (0, 5_000), (4_999, 5_000), (10, 11), (11, 1_000)]:
            assert (stream.read(begin, end) == TOKENS[begin:end]).all()
            assert (np.concatenate(list(stream.part(begin, end).chunks())) == TOKENS[begin:end]).all()
        begins = np.array([0, 3, 995, 4_980])
        assert (stream.windows(begins, 20) == TOKENS[begins[:, None] + np.arange(20)]).all()
        assert (stream.histogram(50_257) == np.bincount(TOKENS, minlength=50_257)).all()


def test_a_part_of_a_part_is_where_one_thinks(tmp_path):
    stream = Stream([open_shard(write_nanogpt(tmp_path / "train.bin", Stream([TOKENS])))])
    assert (stream.part(100, 4_000).part(50, 60).read(2, 8) == TOKENS[152:158]).all()
    assert len(stream.part(4_990, 9_999)) == 10


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p, "does not exist"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"abc"), "odd number"),
        (lambda p: p.write_bytes(b"<!DOCTYPE html><html>" * 100), "HTML page"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: p.write_bytes(pickle.dumps(list(range(99)), 4)), "pickle"),
        (lambda p: np.save(p.open("wb"), TOKENS), "NumPy file"),
        (lambda p: write(p, magic=123), "begins with 123, which is no magic number"),
        (lambda p: write(p, magic=20240522), "holds examples of an evaluation"),
        (lambda p: write(p, order=">"), "big-endian"),
        (lambda p: write(p, version=2), "says version 2"),
        (lambda p: write(p, count=4_999), "4999 tokens by its header and has 5000"),
        (lambda p: write(p, count=-1), "-1 tokens by its header"),
        (lambda p: write(p, tokens=TOKENS[:0]), "0 tokens by its header"),
        (lambda p: p.write_bytes(write(p).read_bytes()[:-100]), "cut short"),
        (lambda p: p.write_bytes(write(p).read_bytes()[:-1]), "has 4999.5"),
        (lambda p: p.write_bytes(write(p).read_bytes()[:500]), "ends within its header"),
        (lambda p: p.mkdir(), "is a directory"),
    ],
)
def test_a_broken_file_is_refused_in_a_sentence(tmp_path, make, said):
    path = tmp_path / "shard.bin"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as refusal:
        open_shard(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_shard_by_its_name_needs_a_header(tmp_path):
    raw = write_nanogpt(tmp_path / "train.bin", Stream([TOKENS]))
    assert len(open_shard(raw)) == 5_000
    with pytest.raises(ValueError, match="no magic number known here"):
        open_shard(raw.rename(tmp_path / "fineweb_train_000001.bin"))


def test_what_does_not_fit_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="70000 does not fit into 2 bytes"):
        write_llmc(tmp_path / "a.bin", Stream([np.array([1, 70_000], np.uint32)]))
    with pytest.raises(ValueError, match="would have no tokens"):
        write_nanogpt(tmp_path / "b.bin", Stream([]))
    with pytest.raises(TypeError), appearing_whole(tmp_path / "c.bin") as file:
        file.writelines([b"half", None])
    assert list(tmp_path.iterdir()) == []


def flipped(rng: random.Random, content: bytes) -> bytes:
    place = rng.choice((rng.randrange(12), rng.randrange(len(content))))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def inserted(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.choice((1, 2, 50))) + content[place:]


def zeroed(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes(len(content[place : place + 200])) + content[place + 200 :]


def test_100_damaged_shards_are_each_read_or_refused_in_a_sentence(tmp_path):
    content = write(tmp_path / "whole.bin").read_bytes()
    refused = 0
    for seed in range(100):
        rng = random.Random(seed)
        mutation = (flipped, cut, inserted, zeroed)[seed % 4]
        path = tmp_path / f"x_train_{seed:06d}.bin"
        path.write_bytes(mutation(rng, content))
        try:
            shard = open_shard(path)
        except ValueError as error:
            refused += 1
            sentence = str(error)
            assert path.name in sentence
            assert "\n" not in sentence
            assert len(sentence) < 400 + len(str(path))
        else:
            assert mutation in (flipped, zeroed)
            assert isinstance(shard, Shard)
            assert len(shard.open()) == 5_000
    assert refused > 50
