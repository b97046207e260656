"""The main job over several seeds: `python benchmarks/main_job.py --seeds 1 2 3 [words for train.py]`.

Runs `python train.py model=dqo data=gsm8k seed=...` with its comparisons, and prints mean and range over the seeds of
every row of the table. Runs that were done before are read, not repeated.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ROWS = {"sft": "SFT start", "sft_continued": "SFT continued", "rft": "RFT", "dro": "DRO-V", "dqo": "DQO"}
METRICS = ("greedy", "sampled", "maj@4", "pass@4")


def results(output: Path) -> dict[str, list[dict]]:
    """results.json of every finished run, by model."""
    found: dict[str, list[dict]] = {}
    for path in sorted(output.glob("*/*/*/results.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["model"], []).append(result)
    return found


def cell(runs: list[dict], metric: str) -> str:
    """Mean over the seeds and each seed, in per cent."""
    values = [100 * v for run in runs for name, v in run["metrics"].items() if name.endswith(f"/{metric}")]
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("outputs/main_job"))
    options, words = parser.parse_known_args()
    for seed in options.seeds:
        command = [sys.executable, str(ROOT / "train.py"), "model=dqo", "data=gsm8k", f"seed={seed}"]
        subprocess.run([*command, f"output={options.output}", *words], check=True)
    print(f"torch {torch.__version__}, {platform.machine()}, seeds {options.seeds}: mean (each seed), per cent")
    print(" | ".join(["", "row", *METRICS, "seconds", ""]).strip())
    print("|---" * (len(METRICS) + 2) + "|")
    for model, runs in results(options.output).items():
        seconds = statistics.mean(run["seconds"] for run in runs)
        cells = [ROWS.get(model, model), *(cell(runs, metric) for metric in METRICS), f"{seconds:.0f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
