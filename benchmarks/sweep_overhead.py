"""What a sweep costs beside the processes it starts: `python benchmarks/sweep_overhead.py [--trials 50] [--agents 2]`.

The same program, which takes a fixed time after Python has started, is run by `tools.sweep` and bare: as many
processes, as many at the same time, with nothing around them. Both sides alternate; per trial, the overhead is the time
from the start of an agent's trial to that of its next, less the median of a bare process. Printed: median, 10th and
90th percentile.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import os, sys, time
from pathlib import Path
time.sleep(0.2)
words = dict(word.split("=") for word in sys.argv[1:])
if "TESSERA_RECORD" in os.environ:
    Path(os.environ["TESSERA_RECORD"]).write_text(os.getcwd() + "/runs/" + words["x"])
    Path("runs", words["x"]).mkdir(parents=True)
    Path("runs", words["x"], "metrics.csv").write_text("step,loss\\n1," + words["x"] + "\\n")
"""
SWEEP = {
    "program": "program.py",
    "method": "bayes",
    "metric": {"name": "loss"},
    "parameters": {name: {"min": 0.0, "max": 1.0} for name in ("x", "y", "z")},
    "command": ["python", "${program}", "${args_no_hyphens}"],
}


def bare(folder: Path, trials: int, agents: int) -> tuple[float, list[float]]:
    """Seconds of all processes, and of each."""

    def one(number: int) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "program.py", f"x={number}", "y=0.1", "z=0.1"], cwd=folder, check=True)
        return time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(agents) as pool:
        each = list(pool.map(one, range(trials)))
    return time.perf_counter() - began, each


def swept(folder: Path, trials: int, agents: int) -> tuple[float, list[float]]:
    """Seconds of the whole command, and from the start of an agent's trial to that of its next."""
    command = [sys.executable, "-m", "tools.sweep", "sweep.yaml", "--folder", "study"]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--agents", str(agents), "--trials", str(trials)],
        cwd=folder,
        check=True,
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    whole = time.perf_counter() - began
    journal = JournalStorage(JournalFileBackend(str(folder / "study" / "journal.log")))
    starts = defaultdict(list)
    for trial in optuna.load_study(study_name="sweep", storage=journal).trials:
        starts[trial.user_attrs["agent"]].append(trial.datetime_start.timestamp())
    return whole, [later - sooner for times in starts.values() for sooner, later in pairwise(times)]


def spread(seconds: list[float]) -> str:
    """Median with the 10th and 90th percentile."""
    cuts = statistics.quantiles(seconds, n=10)
    return f"{statistics.median(seconds):.3f} [{cuts[0]:.3f}, {cuts[-1]:.3f}]"


def main() -> None:
    """Print both sides and the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sides = defaultdict(list)
    for _ in range(options.repeats):
        for name, side in (("bare", bare), ("swept", swept)):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "program.py").write_text(PROGRAM)
                (Path(folder) / "sweep.yaml").write_text(json.dumps(SWEEP))  # JSON is YAML
                sides[name].append(side(Path(folder), options.trials, options.agents))
    each = {name: [second for _, seconds in runs for second in seconds] for name, runs in sides.items()}
    whole = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in sides.items()}
    base = statistics.median(each["bare"])
    print(f"Optuna {optuna.__version__}, {platform.machine()}, {options.trials} trials, {options.agents} agents")
    print(f"a bare process: {spread(each['bare'])} s")
    print(f"overhead a trial: {spread([second - base for second in each['swept']])} s")
    print(f"all: bare {whole['bare']:.2f} s, swept {whole['swept']:.2f} s with start and report")
    print(f"ratio {whole['swept'] / whole['bare']:.2f}")


if __name__ == "__main__":
    main()
