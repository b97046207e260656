"""Games of a tiny policy in conversations of two turns with a cyclic preference: `python benchmarks/ompo_chat.py`.

For every seed a policy is imitated once, and every game plays `--iterations` of equally many steps from it, with the
same optimizer and the same `beta` (the reciprocal of the step 2 of docs/markov_games.md). After each iteration the
exploitability of the policy is computed from the probabilities of all its replies, on eight held-out conversations.
Runs that have ended are not repeated.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parents[1]
GAMES = {
    "OMPO": ["model=ompo", "model.loss.beta=0.5"],
    "MPO": ["model=mpo", "model.loss.beta=0.5"],
    "MPO, one step": ["model=mpo", "model.returns=one_step", "model.loss.beta=0.5"],
    "DPO in every turn": ["model=mpo", "pairwise=dpo", "model.loss.beta=0.5"],
    "SPPO, first turn": ["model=sppo", "model.loss.beta=0.5"],
    "iterative DPO, first turn": ["model=iterative_dpo", "model.loss.beta=0.5"],
}
DATA = ["data=chat", "data.name=standin", "data.standin.cyclic=1.0", "data.standin.test=8", "compare=null"]
LAST = 3  # iterations of the mean


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    asked.add_argument("--iterations", type=int, default=12)
    asked.add_argument("--steps", type=int, default=8, help="of an iteration, 64 pairs each")
    asked.add_argument("--prompts", type=int, default=100, help="conversations of an iteration")
    asked.add_argument("--lr", type=float, default=1e-3)
    asked.add_argument("--output", type=Path, default=Path("outputs/ompo_chat"))
    settings = asked.parse_args()
    print(f"| seed | game | start | after each of {settings.iterations} iterations | mean of the last {LAST} | wins |")
    print("|---|---|---|---|---|---|", flush=True)
    for seed in settings.seeds:
        start = settings.output / f"sft-{seed}"
        train(start, "model=sft", f"seed={seed}", "data.standin.val=8", "stages=[fit,test]")
        before = column(start, "test-standin/exploitability")[-1]
        for name, words in GAMES.items():
            folder = settings.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            play(folder, seed, words, next(start.glob("sft/*/*/export")), settings)
            found = column(folder, "val-standin/exploitability")
            wins = column(folder, "val-standin/win_rate")[-1]
            values = " ".join(f"{value:.3f}" for value in found)
            print(f"| {seed} | {name} | {before:.3f} | {values} | {mean(found[-LAST:]):.3f} | {wins:.3f} |", flush=True)


def play(folder: Path, seed: int, words: list[str], weights: Path, settings: argparse.Namespace) -> None:
    """One game from the imitated policy."""
    steps = settings.iterations * settings.steps
    lengths = [f"model.iterations={settings.iterations}", f"trainer.max_steps={steps}"]
    lengths += [f"trainer.val_check_interval={settings.steps}", "stages=[fit]", f"optimizer.lr={settings.lr}"]
    sizes = [f"data.standin.train={settings.prompts}", "data.standin.val=100", "data.batch_size=64"]
    train(folder, *words, f"seed={seed}", f"policy_weights={weights}", *lengths, *sizes)


def train(folder: Path, *words: str) -> None:
    """`train.py`, which does nothing where this very run has ended."""
    if list(folder.glob("*/*/*/results.json")):
        return
    command = [sys.executable, str(ROOT / "train.py"), *words, *DATA, f"output={folder}", "resume=auto"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def column(folder: Path, name: str) -> list[float]:
    """What was logged under a name, in order."""
    with next(folder.glob("*/*/*/metrics.csv")).open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


if __name__ == "__main__":
    main()
