"""Runs of simulations: where they are, and that a killed one ends as if nothing had happened."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import train
from tests.waiting import until


def run_folder(output: Path) -> Path:
    return next(output.glob("*/*/*/run.json")).parent


def check_that_a_killed_run_ends_with_the_same_bytes(output: Path, job: tuple[str, ...], checkpoint: str) -> None:
    """Beside an undisturbed run: one that is killed once it has a checkpoint of that name, and started again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = ([sys.executable, train.__file__, *job, f"output={output / name}"] for name in ("whole", "killed"))
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    process = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL)
    until(lambda: list((output / "killed").glob(f"*/*/*/checkpoints/{checkpoint}")))
    process.kill()
    assert process.wait() == -9
    again = subprocess.run(killed, env=environment, check=True, capture_output=True, text=True)
    assert "continuing from" in again.stdout
    folders = [run_folder(output / name) for name in ("whole", "killed")]
    for name in ("export/curves.csv", "metrics.csv"):
        undisturbed, disturbed = (_without_throughput(folder / name) for folder in folders)
        assert undisturbed == disturbed
    tables = [json.loads((folder / "results.json").read_text())["table"] for folder in folders]
    assert tables[0] == tables[1]


def _without_throughput(path: Path) -> list[dict[str, str]]:
    rows = csv.DictReader(path.open())
    return [{name: value for name, value in row.items() if not name.startswith("throughput")} for row in rows]
