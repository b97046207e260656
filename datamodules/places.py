"""Where data sets are found beside the hub."""

import os
from pathlib import Path

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def shared(name: str) -> Path | None:
    """The folder or file of a data set in `$TESSERA_DATA`, if there is one."""
    root = os.environ.get("TESSERA_DATA")
    places = [Path(root, f"{name}{ending}") for ending in ("", *ENDINGS)] if root else []
    return next((place for place in places if place.exists()), None)
