"""What it means that two runs follow one loss trajectory, and how the runs of these tests are made."""

import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ANSWERS = ROOT / "tests" / "data" / "main_job_answers.jsonl"
MAX, MEAN = 1e-3, 1e-5  # nats


def launched(output: Path, *words: str) -> Path:
    """`train.py` as a user calls it, on a machine without data and without a network; `output` again."""
    environment = {name: value for name, value in os.environ.items() if name != "TESSERA_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *words, f"output={output}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return output


def train(output: Path, *words: str) -> None:
    """A fit on word problems with every step in its metrics."""
    every_step = ("stages=[fit]", "trainer.val_check_interval=0", "trainer.log_every_n_steps=1")
    launched(output, "data=gsm8k", "compare=null", *words, *every_step)


def curve(output: Path, method: str, column: str = "train/loss") -> list[float]:
    """A column of the method's metrics.csv, one value a step."""
    with next(output.glob(f"{method}/*/*/metrics.csv")).open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def residuals(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """(greatest difference, size of the mean signed difference): noise averages out of the second, a bias does not."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return max(map(abs, differences)), abs(statistics.mean(differences))


def follows(ours: list[float], theirs: list[float]) -> bool:
    """Whether both are one trajectory, up to floating point."""
    greatest, mean = residuals(ours, theirs)
    return greatest <= MAX and mean <= MEAN
