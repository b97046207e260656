"""Where text comes from: files of text, documents or tokens, the Hugging Face hub, or the stand-in; as tokens by part.

Documents are followed by the tokenizer's end token (bytes: a line feed). A plain text is one stream without documents.
"""

import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.jsonl import OPENINGS, field, regular_file
from datamodules.problems import hub_answers, read_rows
from datamodules.shards import RAW, Shard, Stream, appearing_whole, largest, open_shard
from datamodules.text_standin import standard_library
from datamodules.tokenizers import GPT2_END, Tokenizer

log = logging.getLogger(__name__)

VERSION = 1  # of the tokenised text: raise it when the tokens of a text change
DOCUMENTS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
PIECE = 2**20  # characters of a plain text that are tokenised together
WORTH_KEEPING = 2**22  # bytes of text from which on the tokens are kept on the disk
HASHED_WHOLE = 2**30  # bytes of tokens up to which every byte enters the fingerprint
BLOCK, BLOCKS = 2**16, 64  # of larger ones: bytes of a sampled block, and how many of a file


@dataclass(frozen=True)
class Source:
    """Tokens of the parts `train`, `val` and `test`, the last of which may be missing, and where they came from.

    `fingerprint` is the SHA-256 of what was read; of more than 1 GB of tokens, of sizes, headers and sampled blocks.
    `largest` is the largest token with the file that has it, known of files of tokens only. `vocab_size` is what their
    format says, `end` the token between documents, `tokenizer` what made the tokens of a text.
    """

    name: str
    origin: str
    fingerprint: str
    standin: bool
    parts: dict[str, Stream]
    vocab_size: int
    end: int | None
    largest: tuple[int, Path] | None = None
    tokenizer: Tokenizer | None = None


# ---- which files


def locate(path: Path | str) -> dict[str, list[Path]]:
    """The files of every part: of one file, a pattern with `*`, or a folder with files named after the parts.

    Raises FileNotFoundError when there are none, ValueError when several kinds are mixed.
    """
    text = str(path)
    if any(sign in text for sign in "*?[") and not Path(path).exists():
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if Path(name).is_file()]
        if not found:
            raise FileNotFoundError(f"data.path={path} matches no file: correct the pattern")
        return _by_part(found) if all(file.suffix == ".bin" for file in found) else {"train": _one_kind(found, path)}
    if not Path(path).exists():
        raise FileNotFoundError(
            f"data.path={path} does not exist: correct it, or set data.path=null for the stand-in (Python's own source)"
        )
    return _in_folder(Path(path)) if Path(path).is_dir() else {"train": [Path(path)]}


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    if shards := [file for file in files if file.suffix == ".bin"]:
        return _by_part(shards)
    kinds = (*DOCUMENTS, ".txt")
    for kind in kinds:
        found = {part: _named(files, names, kind) for part, names in SPLITS.items()}
        if any(found.values()):
            return {part: some for part, some in found.items() if some}
    raise FileNotFoundError(
        f"{folder} has no train, val (valid) or test file that ends in .bin, {', '.join(kinds)}: give such a folder, "
        "one file, or a pattern such as folder/*.jsonl as data.path"
    )


def _named(files: list[Path], names: tuple[str, ...], ending: str) -> list[Path]:
    """`train.txt`, or the hub's `train-00000-of-00002.parquet`."""
    pattern = re.compile(rf"({'|'.join(names)})(-\d+-of-\d+)?{re.escape(ending)}")
    return [file for file in files if pattern.fullmatch(file.name)]


def _by_part(shards: list[Path]) -> dict[str, list[Path]]:
    """Files of tokens by the part in their name; those without one are for training."""
    found: dict[str, list[Path]] = {}
    for file in shards:
        words = re.split(r"[^a-z]+", file.stem.lower())
        part = next((part for part, names in SPLITS.items() if set(names) & set(words)), "train")
        found.setdefault(part, []).append(file)
    return found


def _one_kind(files: list[Path], path: Path | str) -> list[Path]:
    kinds = sorted({kind(file) for file in files})
    if len(kinds) > 1:
        raise ValueError(f"data.path={path} matches files of several kinds ({', '.join(kinds)}): give one kind")
    return files


def kind(file: Path) -> str:
    """The ending that says how a file is read; what is none of `.bin` and documents is plain text."""
    return next((ending for ending in (".bin", *DOCUMENTS) if file.name.endswith(ending)), ".txt")


# ---- from a file to text


def read_text(path: Path | str) -> str:
    """A plain text in UTF-8. Raises ValueError naming the byte where it is not, or what the file is instead."""
    content = regular_file(path).read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty: download or generate it again")
    if content.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is gzip: unpack it first, only .jsonl.gz is read as it is")
    start = content[:100].lstrip().lower()
    for opening, remedy in OPENINGS.items():
        html = opening == b"<" and not start.startswith((b"<!doctype html", b"<html"))
        if start.startswith(opening.lower()) and not html:
            raise ValueError(
                f"{path} {remedy}" if opening != b"<" else f"{path} is an HTML page: download the raw file"
            )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} of the file is not UTF-8: save the file as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path}: byte {content.index(0)} of the file is zero, so it is no text: save it as UTF-8")
    return text


def texts(path: Path, column: str = "text") -> Iterator[tuple[str, bool]]:
    """The texts of a file in order, and whether a document ends with each; a plain text comes in pieces.

    `column` is the field or column of a document's text. Raises ValueError naming file, line and field.
    """
    if kind(path) == ".txt":
        yield from ((piece, False) for piece in pieces(read_text(path)))
        return
    for line, record in read_rows(path):
        yield field(record, column, str, path, line), True


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """About `size` characters at a time, cut after a line feed that stands between two characters that are not blank.

    There GPT-2's encoding never merges, so that the tokens are those of the whole text.
    """
    begin = 0
    cut = re.compile(r"(?<=\S)\n(?=\S)")
    while found := cut.search(text, begin + size):
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


# ---- from text to tokens


def token_type(vocab_size: int) -> type:
    """The smallest type that tokens are kept in."""
    return np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32


def tokenised(
    given: Iterable[tuple[str, bool]], tokenizer: Tokenizer, enough: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of texts until there are `enough`, and where the documents end in them (int64)."""
    dtype, runs, ends, length = token_type(tokenizer.vocab_size), [], [], 0
    separator = np.array(tokenizer.separator, dtype)
    for text, ends_document in given:
        for run in (tokenizer.encode(text), separator) if ends_document else (tokenizer.encode(text),):
            runs.append(run.astype(dtype, copy=False))
            length += len(run)
        if ends_document:
            ends.append(length)
        if enough and length >= enough:
            break
    return np.concatenate(runs) if runs else np.empty(0, dtype), np.array(ends, np.int64)


def held_out(length: int, ends: np.ndarray, fraction: float) -> int:
    """Where the last `fraction` begins, that is held out: between two documents if there are any, else at a token."""
    if not 0 < fraction < 1:
        raise ValueError(f"data.val_fraction={fraction} must be above 0 and below 1")
    if len(ends) < 2:
        return length - round(length * fraction)
    return int(ends[-1 - max(1, min(len(ends) - 1, round(len(ends) * fraction)))])


def _split(tokens: np.ndarray, ends: np.ndarray, fraction: float) -> dict[str, np.ndarray]:
    cut = held_out(len(tokens), ends, fraction)
    return {"train": tokens[:cut], "val": tokens[cut:]}


# ---- the sources


def find_text(
    path: Path | str | None,
    tokenizer: Callable[[], Tokenizer],
    *,
    hub: dict[str, Any],
    column: str,
    val_fraction: float,
    cache: Path,
) -> Source:
    """Tokens from the first place that has them: `path`, the hub when a data set is named, else the stand-in.

    `tokenizer` makes the tokenizer, where there is text. `hub` has `name`, `config`, `tokens` and `download`. Raises
    FileNotFoundError or ValueError in one sentence.
    """
    if path is not None:
        files, origin = _with_training(locate(path), path), f"data.path={path}"
        if kind(next(iter(files.values()))[0]) == ".bin":
            found = _from_shards(files, origin, val_fraction, cache)
        else:
            found = _from_files(files, origin, tokenizer(), column, val_fraction, cache)
        return replace(found, name=_name(Path(path)))
    if hub["name"]:
        return _from_hub(tokenizer(), column=column, val_fraction=val_fraction, cache=cache, **hub)
    return _from_standin(tokenizer(), val_fraction, cache)


def _name(path: Path) -> str:
    """What results call the data: a file without its endings, a folder, the folder of a pattern."""
    path = path.expanduser().resolve()
    return (path.parent if "*" in path.name else path).name.split(".")[0]


def _with_training(files: dict[str, list[Path]], path: Path | str) -> dict[str, list[Path]]:
    """A folder without a train part, as WikiText's samples: the validation part is trained on, its end held out."""
    if "train" in files:
        return files
    first = next(iter(files))
    log.warning("data.path=%s has no train part: %s is trained on, and its end held out", path, files[first][0].name)
    return {"train": files.pop(first), **files}


def _from_files(
    files: dict[str, list[Path]], origin: str, tokenizer: Tokenizer, column: str, val_fraction: float, cache: Path
) -> Source:
    digest = _digest(f"{part} {_sha256(file)}" for part, some in sorted(files.items()) for file in some)

    def make() -> dict[str, np.ndarray]:
        made = {}
        for part, some in files.items():
            made[part], ends = tokenised(chain.from_iterable(texts(file, column) for file in some), tokenizer)
            if part == "train" and "val" not in files:
                made |= _split(made["train"], ends, val_fraction)
        return made

    key = _digest([digest, tokenizer.fingerprint, column, str(val_fraction), str(VERSION)])
    size = sum(file.stat().st_size for some in files.values() for file in some)
    arrays = _kept(cache, key, make) if size >= WORTH_KEEPING and tokenizer.name != "bytes" else make()
    return _source("text", origin, _digest([digest, tokenizer.fingerprint]), False, arrays, tokenizer)


def _source(
    name: str, origin: str, fingerprint: str, standin: bool, made: dict[str, Any], tokenizer: Tokenizer
) -> Source:
    parts = {part: Stream([tokens]) for part, tokens in made.items()}
    return Source(name, origin, fingerprint, standin, parts, tokenizer.vocab_size, tokenizer.end, tokenizer=tokenizer)


def _kept(cache: Path, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, Shard]:
    """What `make` makes, kept as one file of tokens per part, with an index beside them that is written last."""
    index = cache / f"{key[:32]}.json"
    if not index.exists():
        kept = {}
        for part, tokens in make().items():
            with appearing_whole(cache / f"{key[:32]}-{part}.tokens") as file:
                file.write(tokens.tobytes())
            kept[part] = [len(tokens), tokens.dtype.str]
        with appearing_whole(index) as file:
            file.write(json.dumps(kept).encode())
    shards = {}
    for part, (count, dtype) in _recorded(index).items():
        shards[part] = Shard(cache / f"{key[:32]}-{part}.tokens", 0, count, dtype)
        path = regular_file(shards[part].path)
        if path.stat().st_size != count * np.dtype(dtype).itemsize:
            raise ValueError(f"{path} is damaged: delete it and {index}")
    return shards


def _recorded(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete it") from error


def _from_shards(files: dict[str, list[Path]], origin: str, val_fraction: float, cache: Path) -> Source:
    shards = {part: [open_shard(file) for file in some] for part, some in files.items()}
    every = [shard for some in shards.values() for shard in some]
    if len({shard.dtype for shard in every}) > 1 or len({shard.vocab_size for shard in every}) > 1:
        raise ValueError(f"{origin} mixes shards for different tokenizers: give those of one")
    whole = sum(shard.path.stat().st_size for shard in every) <= HASHED_WHOLE
    digests = [_sha256(shard.path) if whole else _sampled(shard) for shard in every]
    parts = {part: Stream(some) for part, some in shards.items()}
    if "val" not in parts:
        log.warning("%s has no val part: the last %g of the tokens are held out", origin, val_fraction)
        cut = held_out(len(parts["train"]), np.empty(0, np.int64), val_fraction)
        parts |= {"train": parts["train"].part(0, cut), "val": parts["train"].part(cut, len(parts["train"]))}
    top = max((_largest(shard, digest, cache), shard.path) for shard, digest in zip(every, digests))
    fingerprint = _digest(f"{part} {len(stream)}" for part, stream in parts.items()) + _digest(digests)
    end = GPT2_END if every[0].dtype == RAW else None
    return Source("text", origin, _digest([fingerprint]), False, parts, every[0].vocab_size, end, top)


def _sampled(shard: Shard) -> str:
    """SHA-256 of a file's size, its first block, and blocks that are spread over it."""
    size = shard.path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with shard.path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek(number * max(0, size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _largest(shard: Shard, digest: str, cache: Path) -> int:
    """The largest token, looked for once as long as the file stays what it is."""
    known = shard.path.stat()
    key = _digest([digest, str(known.st_mtime_ns), str(known.st_size)])
    kept = cache / f"largest-{key[:32]}.json"
    if kept.exists():
        return int(_recorded(kept))
    found = largest(shard)
    if known.st_size >= WORTH_KEEPING:
        with appearing_whole(kept) as file:
            file.write(json.dumps(found).encode())
    return found


def _from_hub(
    tokenizer: Tokenizer,
    name: str,
    config: str | None,
    tokens: int,
    download: bool,
    column: str,
    val_fraction: float,
    cache: Path,
) -> Source:
    asked = [name, str(config), str(tokens), column, tokenizer.fingerprint, str(val_fraction), str(VERSION)]
    origin = f"hub {name}{f' ({config})' if config else ''}, its first {tokens:,} tokens"
    kept = _kept(
        cache, _digest(asked), lambda: _streamed(tokenizer, name, config, tokens, download, column, val_fraction)
    )
    fingerprint = _digest(_sha256(shard.path) for shard in kept.values())
    return _source("text", origin, fingerprint, False, kept, tokenizer)


def _streamed(
    tokenizer: Tokenizer, name: str, config: str | None, tokens: int, download: bool, column: str, val_fraction: float
) -> dict[str, np.ndarray]:
    if not download or not (Path(name).exists() or hub_answers()):
        why = "data.download=false" if not download else "it does not answer"
        raise ValueError(f"data.hub={name} cannot be read from the Hugging Face hub ({why}): give files as data.path")
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split="train", streaming=True)
        documents = ((field(row, column, str, name, number), True) for number, row in enumerate(rows, start=1))
        found, ends = tokenised(documents, tokenizer, tokens)
    except ValueError as error:
        raise ValueError(
            f"data.hub={name} cannot be read ({_line(error)}): correct data.hub or data.hub_config"
        ) from error
    except Exception as error:  # of half a dozen libraries: network, cache, file formats
        raise ValueError(f"data.hub={name} cannot be read ({_line(error)}): give files as data.path") from error
    return _split(found, ends, val_fraction)


def _from_standin(tokenizer: Tokenizer, val_fraction: float, cache: Path) -> Source:
    text = standard_library()
    log.warning("text-standin: no data.path is given, this is the source of Python's standard library")
    digest = _digest([text, tokenizer.fingerprint])
    given = ((piece, False) for piece in pieces(text))

    def make() -> dict[str, np.ndarray]:
        return _split(*tokenised(given, tokenizer), val_fraction)

    key = _digest([digest, str(val_fraction), str(VERSION)])
    arrays = make() if tokenizer.name == "bytes" else _kept(cache, key, make)
    return _source("text-standin", "source of Python's standard library", digest, True, arrays, tokenizer)


def _sha256(path: Path) -> str:
    with open(regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _line(error: Exception) -> str:
    """The error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
