"""Turn text into shards of tokens, in parallel; they are the same whatever the number of workers.

python -m tools.tokenize_text --input stories.jsonl.gz --output shards
    shards/stories_val_000000.bin, shards/stories_train_000001.bin, ... as llm.c and modded-nanogpt read them
python -m tools.tokenize_text --input book.txt --tokenizer bytes --format nanogpt --output book
    book/train.bin and book/val.bin as nanoGPT reads them
python -m tools.tokenize_text --input 'crawl/*.parquet' --output crawl-gpt2 --workers 16 --val-fraction 0.001

Train with them: python train.py model=gpt2 data=text data.path=shards
The folder --output appears when all of it is written: an interrupted command leaves nothing.
"""

import argparse
import os
import re
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from datamodules.shards import GPT2, LLAMA3, Shard, Stream, write_llmc, write_nanogpt
from datamodules.text_sources import held_out, kind, locate, texts, token_type
from datamodules.tokenizers import make_tokenizer

FORMATS = ("llmc", "nanogpt")
BATCH = 2**20  # characters that a worker gets at once
Batch = list[tuple[str, bool]]  # texts, and whether a document ends with each

known = lru_cache(make_tokenizer)  # one of each in a process


def tokenize(
    source: str,
    output: Path,
    tokenizer: str = "gpt2",
    tokenizer_files: str | None = None,
    form: str = "llmc",
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.05,
    workers: int = 1,
    column: str = "text",
) -> dict[str, int]:
    """Write the text of a file, folder or pattern as tokens into the new folder `output`; their number by part.

    Raises OSError or ValueError in one sentence, and leaves nothing then.
    """
    if shard_tokens < 1 or workers < 1:
        raise ValueError("--shard-tokens and --workers are numbers from 1 on")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already: give another folder as --output, or delete it")
    files = locate(source)
    if any(kind(file) == ".bin" for some in files.values() for file in some):
        raise ValueError(f"{source} holds tokens already: give text as --input")
    vocab_size = known(tokenizer, tokenizer_files).vocab_size
    if form == "nanogpt" and vocab_size > 2**16:
        raise ValueError(
            f"--tokenizer {tokenizer} has {vocab_size} tokens, and nanoGPT's format takes 65,536: use llmc"
        )
    encode = partial(encoded, tokenizer, tokenizer_files, form == "llmc")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as beside, _bar(files) as bar:
        parts = {}
        for part, some in files.items():
            runs = _in_order(encode, _batches(some, column, bar), workers)
            parts[part], ends = _gathered(Path(beside, part), runs, np.dtype(token_type(vocab_size)).str)
            if part == "train" and "val" not in files:
                cut = held_out(len(parts[part]), ends, val_fraction)
                parts |= {"train": parts[part].part(0, cut), "val": parts[part].part(cut, len(parts[part]))}
        ready = Path(beside, "ready")
        _write(parts, ready, _stem(source), form, shard_tokens, GPT2 if vocab_size <= 2**16 else LLAMA3)
        ready.rename(output)  # over an empty folder, if there is one
    return {part: len(stream) for part, stream in parts.items()}


def encoded(tokenizer: str, files: str | None, before: bool, batch: Batch) -> list[tuple[np.ndarray, bool]]:
    """The tokens of a batch, the separator `before` each document as llm.c has it, or after it as nanoGPT has it."""
    made = known(tokenizer, files)
    separator = np.array(made.separator, np.uint32)
    found = []
    for text, ends in batch:
        run = made.encode(text)
        order = (separator, run) if before else (run, separator)
        found.append((np.concatenate(order).astype(token_type(made.vocab_size)) if ends else run, ends))
    return found


def _batches(files: Iterable[Path], column: str, bar: Progress) -> Iterator[Batch]:
    batch, size = [], 0
    for file in files:
        for text, ends in texts(file, column):
            batch.append((text, ends))
            size += len(text)
            if size >= BATCH:
                yield batch
                bar.advance(bar.task_ids[0], size)
                batch, size = [], 0
    if batch:
        yield batch
        bar.advance(bar.task_ids[0], size)


def _in_order(encode: Callable[[Batch], list], batches: Iterable[Batch], workers: int) -> Iterator:
    """`encode` of every batch, in order, a few batches ahead of who reads them."""
    if workers == 1:
        yield from map(encode, batches)
        return
    spawned = get_context("spawn")
    with ProcessPoolExecutor(workers, spawned, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _gathered(path: Path, runs: Iterable[list[tuple[np.ndarray, bool]]], dtype: str) -> tuple[Stream, np.ndarray]:
    """All tokens in one file, and where documents end in it."""
    ends, count = [], 0
    with path.open("wb") as file:
        for run, ends_document in (pair for batch in runs for pair in batch):
            file.write(run.astype(dtype, copy=False).tobytes())
            count += len(run)
            if ends_document:
                ends.append(count)
    return Stream([Shard(path, 0, count, dtype)]), np.array(ends, np.int64)


def _write(parts: dict[str, Stream], folder: Path, stem: str, form: str, shard_tokens: int, magic: int) -> None:
    """One file per part, or numbered shards, those of val first."""
    if form == "nanogpt":
        for part, stream in parts.items():
            write_nanogpt(folder / f"{part}.bin", stream)
        return
    number = 0
    for part in ("val", "train", "test"):
        stream = parts.get(part, Stream([]))
        for begin in range(0, len(stream), shard_tokens):
            shard = stream.part(begin, begin + shard_tokens)
            write_llmc(folder / f"{stem}_{part}_{number:06d}.bin", shard, magic)
            number += 1


def _stem(source: str) -> str:
    return re.sub(r"\W+", "-", Path(source).name.split(".")[0]).strip("-") or "text"


def _bar(files: dict[str, list[Path]]) -> Progress:
    """A bar over the characters to come, which are about the bytes of the files unless these are compressed."""
    every = [file for some in files.values() for file in some]
    compressed = any(file.suffix in (".gz", ".parquet") for file in every)
    columns = (TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(show_speed=True), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    bar.add_task("", total=None if compressed else sum(file.stat().st_size for file in every))
    return bar


def main() -> int:
    """The command line; 1 with a sentence, 130 and 143 after Ctrl-C and SIGTERM."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that what was begun is cleared away
    try:
        counts = tokenize(
            options.input,
            options.output,
            options.tokenizer,
            options.tokenizer_files,
            options.format,
            options.shard_tokens,
            options.val_fraction,
            options.workers,
            options.column,
        )
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {', '.join(f'{count:,} tokens of {part}' for part, count in counts.items())}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tokenize_text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="a .txt, .jsonl(.gz) or .parquet file, a folder, or a pattern")
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or one of transformers by name or folder")
    parser.add_argument("--tokenizer-files", help="folder with GPT-2's vocab.bpe and encoder.json")
    parser.add_argument("--format", choices=FORMATS, default="llmc", help="shards with a header, or raw .bin (llmc)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens of a shard (100,000,000)")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="held out where no val file is given (0.05)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    parser.add_argument("--column", default="text", help="field of a document's text (text)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
