r"""Problems with a worked solution and a gold answer: GSM8K and MATH from files or the hub, or the stand-in by name.

GSM8K: openai/grade-school-math, answers end in `#### 72`. MATH: arXiv 2103.03874, answers stand in `\boxed{}`.
"""

import hashlib
import json
import logging
import os
import random
import re
import reprlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datamodules.answers import boxed, plain_number
from datamodules.jsonl import field, read_jsonl, regular_file

log = logging.getLogger(__name__)

ID_FIELDS = ("id", "unique_id", "uid", "idx")
ENDINGS = ("jsonl", "jsonl.gz", "json", "parquet")
HUB = {"gsm8k": ("openai/gsm8k", "main")}  # mirrors of MATH move since its takedown: that one is given as a path
HUB_PROBE = 2.0  # seconds
# files that are only ever tested on, whatever they are called
HELD_OUT = {
    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14": "GSM8K's test split",
    "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132": "MATH-500",
}
STANDIN_SETTINGS = {"sft", "prompts", "val", "test", "misconception", "slip"}
NAMED_FILES = {"math": {"train": "math_level5_nt_cp.jsonl", "test": "math_500.jsonl"}}


@dataclass(frozen=True)
class Problem:
    """A question, a worked solution to imitate, and the gold answer (a plain numeral for GSM8K, LaTeX for MATH)."""

    id: str
    question: str
    solution: str
    gold: str


@dataclass(frozen=True)
class Source:
    """Where the problems came from, and the problems.

    `name` is what logs and results say (`gsm8k`, `gsm8k-standin`). `fingerprint` is the SHA-256 of the bytes read, or
    of the generator's parameters. `parts` has `sft` (solutions to imitate), `prompts` (questions to answer in
    training), `val` and `test`; of real data, `sft` and `prompts` are the same rows.
    """

    name: str
    origin: str
    fingerprint: str
    standin: bool
    parts: dict[str, list[Problem]]


def strip_annotations(text: str) -> str:
    """The solution without GSM8K's calculator marks `<<48/2=24>>`."""
    return re.sub(r"<<[^>]*>>", "", text)


# ---- one record


def gsm8k_problem(record: dict, id: str, path: Path | str, line: int) -> Problem:
    """A {question, answer} record whose answer ends in `#### <number>`."""
    question, solution = field(record, "question", str, path, line), field(record, "answer", str, path, line)
    _, mark, last = solution.rpartition("####")
    gold = plain_number(last)
    if not mark:
        raise ValueError(f"{path}, line {line}: field `answer` has no `####`: end it with `#### <number>`")
    if gold is None:
        raise ValueError(f"{path}, line {line}: field `answer` must end in a number, got {reprlib.repr(last.strip())}")
    return Problem(_own_id(record, id, path, line), question, solution, gold)


def math_problem(record: dict, id: str, path: Path | str, line: int) -> Problem:
    r"""A record of MATH, MATH-500 or OlympiadBench.

    The gold answer is `answer`, else the first of `final_answer`, else the last `\boxed{}` of the solution. A solution
    without a box, as OlympiadBench's, gets a last line with one: it is imitated, and answers are looked for in boxes.
    """
    question = field(record, "question" if "question" in record else "problem", str, path, line)
    solution, gold = _first(record, "solution", path, line), _gold(record, path, line)
    if boxed(solution) is None:
        solution = f"{solution}\nThe answer is $\\boxed{{{gold}}}$."
    return Problem(_own_id(record, id, path, line), question, solution, gold)


def _gold(record: dict, path: Path | str, line: int) -> str:
    for key in ("answer", "final_answer"):
        if record.get(key) is not None:
            return _first(record, key, path, line).strip().strip("$")
    gold = boxed(_first(record, "solution", path, line))
    if gold is None:
        raise ValueError(f"{path}, line {line}: no field `answer` and no closed \\boxed{{}} in field `solution`")
    return gold


def _first(record: dict, key: str, path: Path | str, line: int) -> str:
    """The text of a field that holds one, or a list of which the first counts."""
    if isinstance(record.get(key), list):
        first = field(record, key, list, path, line)[0]
        return field({key: first}, key, str, path, line)
    return field(record, key, str, path, line)


def _own_id(record: dict, default: str, path: Path | str, line: int) -> str:
    key = next((key for key in ID_FIELDS if record.get(key) is not None), None)
    if key is None:
        return default
    return str(field(record, key, int if isinstance(record[key], int) else str, path, line))


# ---- one file


def read_gsm8k(path: Path | str, split: str = "train", on_error: str = "stop") -> list[Problem]:
    """The rows of a GSM8K file, JSON lines or parquet; ids are `<split>-<row>` unless the file has its own.

    Raises ValueError naming file, line and field; with `on_error="skip"` bad rows are left out and counted in one
    warning.
    """
    return _read([Path(path)], gsm8k_problem, split, on_error)


def read_math(path: Path | str, split: str = "train", on_error: str = "stop") -> list[Problem]:
    """The rows of a MATH file, JSON lines or parquet, as `read_gsm8k`; rows that name another `split` are left out."""
    return _read([Path(path)], math_problem, split, on_error)


READERS: dict[str, Callable[[dict, str, Path | str, int], Problem]] = {"gsm8k": gsm8k_problem, "math": math_problem}


def read_rows(path: Path, defects: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """(row number from 1, record) of a parquet or a JSON lines file, by its ending."""
    return _read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path, defects)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    regular_file(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                raise ValueError(f"{path} is empty: download or generate it again")
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({_line(error)}): download it again") from error


def _read(paths: list[Path], make: Callable[..., Problem], split: str, on_error: str) -> list[Problem]:
    problems, start = [], 0
    defects = None if _checked(on_error) == "stop" else []
    seen: dict[tuple[str, str], str] = {}
    for path in paths:
        line = 0
        for line, record in read_rows(path, defects):
            if record.get("split", split) == split:
                problems += _made(make, record, f"{split}-{start + line - 1}", path, line, seen, defects)
        start += line
    return _usable(problems, split, paths, defects)


def _made(make, record, id, path, line, seen, defects) -> list[Problem]:
    """The problem of one record, or none when it is bad and bad ones are skipped."""
    try:
        problem = make(record, id, path, line)
        for key, value in (("id", problem.id), ("question", problem.question)):
            if first := seen.get((key, value)):
                raise ValueError(f"{path}, line {line}: field `{key}` repeats {first}: delete one of the two rows")
        seen |= {
            ("id", problem.id): f"{path.name}, line {line}",
            ("question", problem.question): f"{path.name}, line {line}",
        }
        return [problem]
    except ValueError as error:
        if defects is None:
            raise
        defects.append(str(error))
        return []


def _usable(problems: list[Problem], split: str, paths: list[Path], defects: list[str] | None) -> list[Problem]:
    if defects:
        log.warning("%d bad rows skipped (data.on_error=skip), the first: %s", len(defects), defects[0])
    if not problems:
        raise ValueError(f"{paths[0]} has no usable row of the split {split!r}: check the file and its field `split`")
    return problems


def _checked(on_error: str) -> str:
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}: set data.on_error")
    return on_error


# ---- one data set


def find(
    dataset: str,
    path: Path | str | None = None,
    download: bool = False,
    *,
    val_size: int = 500,
    seed: int = 0,
    standin: Mapping[str, Any] | None = None,
    on_error: str = "stop",
) -> Source:
    """The problems of "gsm8k" or "math" from the first place that has them.

    In order: `path` (a file or a folder; an error when it is missing), `$TESSERA_DATA/<dataset>`, the Hugging Face hub
    when `download` and it answers within two seconds, the generated stand-in with a warning. `val` is the last
    `val_size` train rows of a permutation seeded by `seed`. `standin` has the sizes `sft`, `prompts`, `val`, `test`
    and the chances `misconception`, `slip`.
    """
    if dataset not in READERS:
        raise ValueError(f"no data set {dataset!r}: data.name is one of {', '.join(READERS)}")
    settings = {"val_size": val_size, "seed": seed, "on_error": _checked(on_error)}
    if path is not None:
        return _from_path(dataset, _existing(dataset, path), f"data.path={path}", **settings)
    root = os.environ.get("TESSERA_DATA")
    if root and (Path(root) / dataset).exists():
        return _from_path(dataset, Path(root) / dataset, f"$TESSERA_DATA/{dataset} in {root}", **settings)
    if download and dataset in HUB and hub_answers():
        return _from_hub(dataset, **settings)
    return _from_standin(dataset, seed, dict(standin or {}))


def _existing(dataset: str, path: Path | str) -> Path:
    if Path(path).exists():
        return Path(path)
    root = os.environ.get("TESSERA_DATA")
    raise FileNotFoundError(
        f"data.path={path} does not exist: correct it, or set data.path=null to look in $TESSERA_DATA/{dataset}"
        f" ({root or 'not set'}), then on the hub ({HUB.get(dataset, ['not for this set'])[0]}), then use the stand-in"
    )


def _from_path(dataset: str, path: Path, origin: str, val_size: int, seed: int, on_error: str) -> Source:
    files = _files(dataset, path)
    rows = {split: _read(found, READERS[dataset], split, on_error) for split, found in files.items()}
    digest = hashlib.sha256()
    for split, found in sorted(files.items()):
        digest.update("".join([split, *map(sha256, found)]).encode())
    log.info("%s from %s: %s", dataset, origin, {split: len(problems) for split, problems in rows.items()})
    return Source(dataset, origin, digest.hexdigest(), False, _parts(rows, val_size, seed, origin))


def _files(dataset: str, path: Path) -> dict[str, list[Path]]:
    """The files of train and test. A single file is train, unless its name or bytes are those of a test set."""
    if not path.is_dir():
        tested = path.name.startswith(("test", NAMED_FILES["math"]["test"])) or sha256(path) in HELD_OUT
        return {"test" if tested else "train": [path]}
    found = {split: _shards(path, split) for split in ("train", "test")}
    for split, name in NAMED_FILES.get(dataset, {}).items():
        found[split] = found[split] or [path / name] * (path / name).exists()
    if not found["train"]:
        raise FileNotFoundError(
            f"{path} has no train.{{{','.join(ENDINGS)}}}: give data.path a folder that has it, or a file"
        )
    for file in found["train"]:
        if held_out := HELD_OUT.get(sha256(file)):
            raise ValueError(f"{file} is {held_out}, which is never trained on: put the train split there")
    return {split: files for split, files in found.items() if files}


def _shards(folder: Path, split: str) -> list[Path]:
    """`train.jsonl`, or the hub's `main/train-00000-of-00001.parquet`: of one ending, in order."""
    for place in (folder, folder / "main", folder / "data"):
        for ending in ENDINGS:
            name = re.compile(rf"{split}(-\d+-of-\d+)?\.{re.escape(ending)}")
            if found := sorted(file for file in place.glob(f"{split}*") if name.fullmatch(file.name)):
                return found
    return []


def _parts(rows: dict[str, list[Problem]], val_size: int, seed: int, origin: str) -> dict[str, list[Problem]]:
    train, test = rows.get("train", []), rows.get("test", [])
    tested = {problem.question: problem.id for problem in test}
    for problem in train:
        if problem.question in tested:
            raise ValueError(
                f"{origin}: {problem.id} is the question of {tested[problem.question]}: delete it from train"
            )
    if train and not 0 <= val_size < len(train):
        raise ValueError(f"val_size={val_size} of {len(train)} train rows from {origin}: set data.val_size below that")
    order = random.Random(seed).sample(range(len(train)), len(train))
    kept = [train[i] for i in sorted(order[: len(train) - val_size])] if train else []
    held = [train[i] for i in order[len(train) - val_size :]] if train else []
    return {"sft": kept, "prompts": kept, "val": held, "test": test}


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with open(regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the hub


def hub_answers() -> bool:
    """Whether the hub accepts a connection within two seconds, and is not switched off by HF_HUB_OFFLINE."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    address = (endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443))
    answered = threading.Event()
    # in a thread, because the time limit of a socket does not cover the look-up of the name
    threading.Thread(target=_connect, args=(address, answered), daemon=True).start()
    return answered.wait(HUB_PROBE)


def _connect(address: tuple[str, int], answered: threading.Event) -> None:
    try:
        socket.create_connection(address, timeout=HUB_PROBE).close()
        answered.set()
    except OSError:
        pass


def read_hub(dataset: str, split: str, on_error: str = "stop") -> list[Problem]:
    """The rows of a split from the Hugging Face hub, cached by `datasets`. Raises ValueError when it fails."""
    import datasets

    name, config = HUB[dataset]
    try:
        rows: Iterable[dict] = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of half a dozen libraries: network, cache, file formats
        raise ValueError(
            f"{name} cannot be read from the hub ({_line(error)}): set data.download=false or data.path"
        ) from error
    defects = None if _checked(on_error) == "stop" else []
    seen: dict[tuple[str, str], str] = {}
    path = Path(f"{name}:{split}")
    made = [_made(READERS[dataset], row, f"{split}-{i}", path, i + 1, seen, defects) for i, row in enumerate(rows)]
    return _usable([problem for problems in made for problem in problems], split, [path], defects)


def _from_hub(dataset: str, val_size: int, seed: int, on_error: str) -> Source:
    rows = {split: read_hub(dataset, split, on_error) for split in ("train", "test")}
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    origin = f"hub {HUB[dataset][0]}"
    return Source(dataset, origin, digest, False, _parts(rows, val_size, seed, origin))


# ---- the stand-in


def _from_standin(dataset: str, seed: int, settings: dict[str, Any]) -> Source:
    from datamodules import standin  # here, because its rows are Problems

    if unknown := settings.keys() - STANDIN_SETTINGS:
        allowed = ", ".join(sorted(STANDIN_SETTINGS))
        raise ValueError(f"data.standin has no setting {', '.join(sorted(unknown))}: it has {allowed}")
    sizes = {part: settings.pop(part, 0) for part in ("sft", "prompts", "val", "test")}
    arguments = {"sizes": sizes, "seed": seed, "boxed": dataset == "math", **settings}
    digest = hashlib.sha256(json.dumps([standin.VERSION, arguments], sort_keys=True).encode()).hexdigest()
    name = f"{dataset}-standin"
    log.warning(
        "%s: no %s found, these problems are generated and results on them are not %s's", name, dataset, dataset
    )
    return Source(name, "generated stand-in", digest, True, standin.split(**arguments))


def _line(error: Exception) -> str:
    """The error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
