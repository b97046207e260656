"""Entries of the Electron Microscopy Data Bank by accession, downloaded once, whole and checked."""

import gzip
import hashlib
import logging
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from datamodules.map_cache import alone, file_digest
from datamodules.map_entries import Entry
from datamodules.shards import appearing_whole

log = logging.getLogger(__name__)

EMDB_ARCHIVE = "https://ftp.ebi.ac.uk/pub/databases/emdb/structures"
TIMEOUT = 30  # seconds without an answer
AT_ONCE = 2**20  # bytes
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)


def download(
    accessions: Sequence[int | str], folder: Path, half_maps: bool, archive: str = EMDB_ARCHIVE
) -> list[Entry]:
    """The entries with these numbers (3488, or EMD-3488), in EMDB's own layout below `folder`.

    What is there is not asked for again; its SHA-256 is kept beside each file and compared. A file that was begun is
    gone on with. Raises ValueError in one sentence when the archive does not answer, has no such entry, or sends
    something broken.
    """
    numbers = [_number(accession) for accession in accessions]
    with alone(folder / ".lock"), _progress() as progress:
        return [_entry(number, folder, half_maps, archive, progress) for number in numbers]


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(*COLUMNS, console=console, disable=not console.is_terminal)


def _number(accession: int | str) -> int:
    found = re.fullmatch(r"(?:emd[-_]?)?(\d{4,5})", str(accession).strip(), re.I)
    if not found:
        raise ValueError(f"data.accessions has {accession!r}: give numbers of four or five digits, such as 3488")
    return int(found[1])


def _entry(number: int, folder: Path, half_maps: bool, archive: str, progress: Progress) -> Entry:
    id = f"EMD-{number:04d}"
    names = {"map": f"map/emd_{number:04d}.map.gz"}
    if half_maps:
        names |= {f"half{half}": f"other/emd_{number:04d}_half_map_{half}.map.gz" for half in (1, 2)}
    files = {
        role: _file(f"{archive}/{id}/{name}", folder / id / name, folder, progress) for role, name in names.items()
    }
    header = _file(
        f"{archive}/{id}/header/emd-{number:04d}.xml", folder / id / f"header/emd-{number:04d}.xml", folder, progress
    )
    text = header.read_text(errors="replace")
    return Entry(
        id, **files, contour=_value(text, "level"), resolution=_value(text, "resolution"), cluster=id, listed=True
    )


def _value(text: str, element: str) -> float | None:
    """The number in the first element of that name."""
    found = re.search(rf"<{element}(?:\s[^>]*)?>\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*</{element}>", text)
    return float(found[1]) if found else None


def _file(url: str, path: Path, folder: Path, progress: Progress) -> Path:
    """The file, as it was downloaded and found whole, now or before."""
    note = path.with_name(f"{path.name}.sha256")
    if path.exists() and note.exists():
        if file_digest(path, folder) == note.read_text().strip():
            return path
        log.warning("%s is not what was downloaded, and is downloaded again", path)
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _receive(url, part, progress)
    except urllib.error.HTTPError as error:
        what = "is not there" if error.code in (403, 404) else f"answers {error.code}"
        raise ValueError(f"{url} {what}: correct data.accessions, or give files as data.path") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{url} cannot be reached ({reason}): give files as data.path, or try again") from error
    _check_whole(url, part)
    with part.open("rb") as received, appearing_whole(note) as file:
        file.write(hashlib.file_digest(received, "sha256").hexdigest().encode())
    part.replace(path)
    return path


def _receive(url: str, part: Path, progress: Progress) -> None:
    """Bytes of `url` into `part`, from where an earlier attempt stopped if the server can do that."""
    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send, or the part is longer than the file
            raise
        part.unlink()
        return _receive(url, part, progress)
    with answer:
        begun = begun if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = int(length) + begun if length else None
        task = progress.add_task(Path(url).name, total=total, completed=begun)
        with part.open("ab" if begun else "wb") as file:
            while some := answer.read(AT_ONCE):
                file.write(some)
                progress.update(task, advance=len(some))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"it ended after {part.stat().st_size:,} of {total:,} bytes")


def _check_whole(url: str, part: Path) -> None:
    """A gzip file carries a checksum of its contents."""
    if not url.endswith(".gz"):
        return
    try:
        with gzip.open(part) as file:
            while file.read(AT_ONCE):
                pass
    except (OSError, EOFError, zlib.error) as error:
        part.unlink()
        raise ValueError(f"{url} arrived damaged ({error}): try again, or give files as data.path") from error
