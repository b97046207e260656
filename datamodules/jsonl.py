"""JSON lines, read so that every defect is one sentence that names the file, the line and the remedy.

A row ends at a line feed and nowhere else: GSM8K has a row that contains U+2028, on which `str.splitlines` breaks.
"""

import gzip
import json
import math
import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

MAX_INTEGER_DIGITS = 100  # beyond what a float holds (308) nothing downstream can be computed, and parsing is quadratic

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OPENINGS = {
    b"<": "looks like an HTML page: download the raw file",
    b"version https://git-lfs": "is a Git LFS pointer, not the data: run `git lfs pull`",
    b"PAR1": "is a parquet file: give it the ending .parquet",
    b"PK": "is a zip archive: unpack it first",
}


def read_jsonl(path: Path | str, defects: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, record) of a JSON lines file; blank lines, CRLF, a BOM and gzip are accepted.

    Raises FileNotFoundError for a missing file and ValueError for every other defect, while iterating. With `defects`
    given, a bad line is left out and its sentence appended there; a defect of the whole file still raises.
    """
    path = regular_file(path)
    found, offset = False, 0
    for line, content in enumerate(_lines(path), start=1):
        if content.strip():
            found = True
            try:
                yield line, _record(content, path, line, offset)
            except ValueError as error:
                if defects is None:
                    raise
                defects.append(str(error))
        offset += len(content)
    if not found:
        raise ValueError(f"{path} is empty: download or generate it again")


def field(record: dict, key: str, kind: type, path: Path | str, line: int) -> Any:
    """The value of `key`, which must be there, be a `kind`, and be neither blank nor infinite nor NaN.

    An int is accepted where `kind` is float; a bool is a number nowhere. Raises ValueError.
    """
    if record.get(key) is None:
        raise ValueError(f"{path}, line {line}: field `{key}` is missing, the row has {reprlib.repr(list(record))}")
    value = record[key]
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path}, line {line}: field `{key}` must be {kind.__name__}, got {reprlib.repr(value)}")
    if (isinstance(value, str) and not value.strip()) or (isinstance(value, list | dict) and not value):
        raise ValueError(f"{path}, line {line}: field `{key}` is empty, fill it in or delete the row")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}, line {line}: field `{key}` must be a finite number, got {value}")
    return value


def regular_file(path: Path | str) -> Path:
    """The path, when a regular file is there; otherwise the error that says what is."""
    path = Path(path)
    try:
        exists, regular = path.exists(), path.is_file()
    except OSError as error:  # for example a name longer than the file system allows
        raise ValueError(f"{reprlib.repr(str(path))} cannot be looked up: {error.strerror}") from error
    if not exists:
        raise FileNotFoundError(f"{path} does not exist (looked for the file {path.absolute()}): correct the path")
    if not regular:
        kind = "a directory" if path.is_dir() else "a device or pipe"
        raise ValueError(f"{path} is {kind}: give the path of a file")
    return path


def _lines(path: Path) -> Iterator[bytes]:
    """Raw lines with their line feed, decompressed when the first bytes are gzip's."""
    try:
        with open(path, "rb") as file:
            opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
        with opener(path, "rb") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a broken or truncated gzip file ({error}): download it again") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _record(content: bytes, path: Path, line: int, offset: int) -> dict:
    where = f"{path}, line {line}"
    if line == 1:
        offset += 3 * content.startswith(BYTE_ORDER_MARK)
        content = content.removeprefix(BYTE_ORDER_MARK)
        _check_opening(content, path)
    try:
        record = json.loads(
            content.decode(), parse_constant=_refuse_constant, parse_int=_bounded_integer, parse_float=_finite_float
        )
        _check_surrogates(content, record)
    except UnicodeDecodeError as error:
        byte = offset + error.start
        raise ValueError(f"{where}: byte {byte} of the file is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        cut = "" if content.endswith(b"\n") else " (the file may be cut short: download it again)"
        raise ValueError(
            f"{where}: invalid JSON at column {error.colno}, {error.msg}{cut}: write one JSON object per line"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where}: the JSON is nested too deeply: write flat records") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {reprlib.repr(record)}: write one JSON object per line")
    return record


def _check_opening(content: bytes, path: Path) -> None:
    for opening, remedy in OPENINGS.items():
        if content.lstrip().startswith(opening):
            raise ValueError(f"{path}, line 1: the file {remedy}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON: write a finite number or null")


def _bounded_integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits: at most {MAX_INTEGER_DIGITS} are read")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {reprlib.repr(digits)} overflows: write a finite number")
    return value


def _check_surrogates(content: bytes, record: object) -> None:
    """Half a surrogate pair is legal in JSON and cannot be encoded again: it would fail far from here."""
    if b"\\ud" in content.lower():
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "half a UTF-16 surrogate pair (\\ud800 to \\udfff): save the file again as UTF-8"
            ) from None
