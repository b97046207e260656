"""Where conversations are found: files, $TESSERA_DATA, the hub, or the generated game; and how they are split."""

import dataclasses
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules import chat_standin
from datamodules.chat_standin import GamePreference
from datamodules.conversations import Conversation, Ledger, read_conversations
from datamodules.places import ENDINGS, shared
from datamodules.problems import hub_answers, read_rows, sha256

log = logging.getLogger(__name__)

STANDIN = "standin"
# what a split is called, in files and on the hub; RewardBench's `filtered` is only ever tested on
SPLITS = {"train": ("train_prefs", "train"), "test": ("test_prefs", "test", "filtered")}
HUB = {
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized",
    "hh": "Anthropic/hh-rlhf",
    "skywork": "Skywork/Skywork-Reward-Preference-80K-v0.2",
    "reward_bench": "allenai/reward-bench",
}
STANDIN_SETTINGS = {"train", "val", "test", "turns", "things", "cyclic", "strength", "soft_labels"}


@dataclass(frozen=True)
class ChatSource:
    """Where the conversations came from, and the conversations.

    `name` is what logs, results and folders say. `fingerprint` is the SHA-256 of the bytes read, or of the generator's
    parameters. `parts` has `train`, `val` and `test`, no two of which share a first turn of the user. `preference` is
    the true one, where it is known.
    """

    name: str
    origin: str
    fingerprint: str
    standin: bool
    parts: dict[str, list[Conversation]]
    preference: GamePreference | None = None


def find_conversations(
    name: str,
    path: Path | str | None = None,
    download: bool = False,
    *,
    held_out: float = 0.2,
    val_size: int = 200,
    seed: int = 0,
    standin: Mapping[str, Any] | None = None,
    on_error: str = "stop",
) -> ChatSource:
    """The conversations of a set from the first place that has them.

    In order: `path` (a file or a folder; an error when it is missing), `$TESSERA_DATA/<name>` (also with the ending
    .jsonl), the hub when `download` and it answers within two seconds, the generated game with a warning. `held_out`
    is the share of first turns that is not trained on, half for validation (at most `val_size`) and half for the test,
    where the set has no test of its own.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"data.held_out={held_out} is the share of conversations not trained on: set it in (0, 1)")
    settings = {"held_out": held_out, "val_size": val_size, "seed": seed}
    ledger = Ledger(on_error)
    if path is not None:
        place = _existing(name, path)
        return _from_files(place.name.split(".")[0], place, f"data.path={path}", ledger, settings)
    if name != STANDIN:
        if place := shared(name):
            return _from_files(name, place, f"$TESSERA_DATA/{name}", ledger, settings)
        hub = HUB.get(name, name if "/" in name else None)
        if download and hub and hub_answers():
            return _from_hub(name, hub, ledger, settings)
    return _from_standin(name, seed, dict(standin or {}))


def _existing(name: str, path: Path | str) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(
            f"data.path={path} does not exist: correct it, or set data.path=null to look in $TESSERA_DATA/{name} "
            f"({os.environ.get('TESSERA_DATA') or 'not set'}), then on the hub, then use the stand-in"
        )
    return Path(path)


# ---- files


def _from_files(name: str, path: Path, origin: str, ledger: Ledger, settings: dict[str, Any]) -> ChatSource:
    files, digest, rows = _files(path), hashlib.sha256(), {}
    seen: set[str] = set()
    for split, found in sorted(files.items()):
        defects: list[str] | None = None if ledger.stops else []
        rows[split] = [
            row
            for file in found
            for row in read_conversations(read_rows(file, defects), str(file), split, ledger, seen)
        ]
        if defects:
            ledger.counts["the line is no JSON object"] += len(defects)
        digest.update("".join([split, *map(sha256, found)]).encode())
    return _source(name, origin, digest.hexdigest(), rows, ledger, settings)


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of train and test. A single file is train, unless it is named like a test."""
    if path.is_file():
        return {"test" if path.name.startswith(SPLITS["test"]) else "train": [path]}
    files = sorted(file for place in (path, path / "data") for file in place.glob("*") if file.name.endswith(ENDINGS))
    named = {split: _shards(files, names) for split, names in SPLITS.items()}
    if any(named.values()):
        return {split: found for split, found in named.items() if found}
    if len(files) != 1:
        there = ", ".join(file.name for file in files) or "no .jsonl or .parquet"
        raise FileNotFoundError(f"{path} has neither train nor test files but {there}: give data.path one file")
    return {"train": files}


def _shards(files: list[Path], names: tuple[str, ...]) -> list[Path]:
    """`train.jsonl`, or the hub's `train-00000-of-00001.parquet`, under the first name that is there."""
    for name in names:
        shape = re.compile(rf"{name}(-\d+-of-\d+)?({'|'.join(map(re.escape, ENDINGS))})")
        if found := [file for file in files if shape.fullmatch(file.name)]:
            return found
    return []


def _source(
    name: str, origin: str, digest: str, rows: dict[str, list[Conversation]], ledger: Ledger, settings: dict[str, Any]
) -> ChatSource:
    if counted := str(ledger):
        log.warning("%s: %d rows left out (data.on_error=skip): %s", origin, ledger.counts.total(), counted)
    if not any(rows.values()):
        raise ValueError(f"{origin} has no usable row: check the file and the fields of its rows")
    parts = split_by_opening(rows, **settings)
    log.info("%s: %s conversations", origin, {part: len(found) for part, found in parts.items()})
    return ChatSource(name.replace("/", "-"), origin, digest, False, parts)


def split_by_opening(
    rows: dict[str, list[Conversation]], held_out: float, val_size: int, seed: int
) -> dict[str, list[Conversation]]:
    """`train`, `val` and `test`; conversations with the same first turn of the user stay together.

    The rows of a set's own test are the test, and training rows that begin as one of them are left out and counted.
    """
    tested = {row.opening for row in rows.get("test", [])}
    learned = [row for row in rows.get("train", []) if row.opening not in tested]
    if left := len(rows.get("train", [])) - len(learned):
        log.warning("%d training rows begin as a row of the test: left out", left)
    openings = sorted({row.opening for row in learned})
    random.Random(seed).shuffle(openings)
    half = round(len(openings) * held_out / 2)
    val = set(openings[: min(half, val_size)])
    tested |= set() if tested else set(openings[len(val) : len(val) + half])
    return {
        "train": [row for row in learned if row.opening not in val | tested],
        "val": [row for row in learned if row.opening in val],
        "test": rows.get("test") or [row for row in learned if row.opening in tested],
    }


# ---- the hub


def _from_hub(name: str, hub: str, ledger: Ledger, settings: dict[str, Any]) -> ChatSource:
    seen: set[str] = set()
    rows = {
        split: read_conversations(enumerate(records, start=1), f"{hub}:{split}", split, ledger, seen)
        for split, records in hub_rows(hub).items()
    }
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    return _source(name, f"hub {hub}", digest, rows, ledger, settings)


def hub_rows(hub: str) -> dict[str, Any]:
    """The records of a set's train and test splits, cached by `datasets`. Raises ValueError when that fails."""
    import datasets

    try:
        there = datasets.get_dataset_split_names(hub)
        chosen = {split: next((name for name in names if name in there), None) for split, names in SPLITS.items()}
        return {split: datasets.load_dataset(hub, split=name) for split, name in chosen.items() if name}
    except Exception as error:  # of half a dozen libraries: network, cache, file formats
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{hub} cannot be read from the hub ({reason}): set data.download=false or data.path"
        ) from error


# ---- the stand-in


def _from_standin(asked: str, seed: int, settings: dict[str, Any]) -> ChatSource:
    if unknown := settings.keys() - STANDIN_SETTINGS:
        allowed = ", ".join(sorted(STANDIN_SETTINGS))
        raise ValueError(f"data.standin has no setting {', '.join(sorted(unknown))}: it has {allowed}")
    sizes = {part: settings.get(part, 0) for part in ("train", "val", "test")}
    known = {field.name for field in dataclasses.fields(GamePreference)}
    preference = GamePreference(**{key: value for key, value in settings.items() if key in known})
    turns, soft = settings.get("turns", 2), settings.get("soft_labels", False)
    digest = hashlib.sha256(json.dumps([chat_standin.VERSION, seed, settings], sort_keys=True).encode()).hexdigest()
    parts = chat_standin.generate(sizes, seed, turns, preference, soft)
    missing = "" if asked == STANDIN else f"no {asked} found, "
    log.warning(
        "chat-standin: %sthese conversations are a generated game, and results on them say nothing of chat", missing
    )
    return ChatSource("chat-standin", "generated game", digest, True, parts, preference)
