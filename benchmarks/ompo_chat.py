"""Games of a tiny policy in conversations of two turns with a cyclic preference: `python benchmarks/ompo_chat.py`.

Plays `experiment=ompo_chat` for every seed: a policy is imitated, and every game plays equally many and long iterations
from it, with the same optimizer and the same `beta` (the reciprocal of the step 2 of docs/markov_games.md). After each
iteration the exploitability of the policy is computed from the probabilities of all its replies on eight held-out
conversations; at the end whole conversations are sampled against those of the start. The same steps in the tables
(`lightning_modules/theory/`, from the uniform policy) stand beside. Runs that have ended are not repeated.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from datamodules.games import rps2
from lightning_modules.theory.markov_game import exploitability, occupancy, uniform
from lightning_modules.theory.mirror_descent import MirrorDescent
from tessera.comparison import curve
from tessera.compose import compose
from tessera.folder import RunFolder

ROOT = Path(__file__).parents[1]
EXPERIMENT = "experiment=ompo_chat"
STANDIN = "test-standin"
STEP, LAST = 2.0, 5  # of mirror descent; iterations of the mean
ONE_STEP = {"returns": "one_step"}
EXACT = {"OMPO": {"optimistic": True}, "MPO": {}, "MPO, one step": ONE_STEP, "SPPO": ONE_STEP}
FIRST_TURN = ("SPPO", "iterative DPO")  # learn nothing of the second turn
BySeed = dict[int, list[float]]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    asked.add_argument("--output", type=Path, default=Path("outputs/ompo_chat"))
    asked.add_argument("--picture", type=Path, help="default: exploitability.png in the output; the curves beside it")
    asked.add_argument("--read", action="store_true", help="play nothing: what is there already")
    settings = asked.parse_args()
    for seed in [] if settings.read else settings.seeds:
        words = [EXPERIMENT, f"seed={seed}", f"output={settings.output}"]
        if status := subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=sys.stderr).returncode:
            sys.exit(status)
    found = {game: ended(settings.output, words, settings.seeds) for game, words in games().items()}
    curves = {game: {seed: exploited(run) for seed, run in runs.items()} for game, runs in found.items()}
    exact = {game: in_tables(game, max(map(len, curves["OMPO"].values()))) for game in EXACT}
    report(found, curves, exact)
    picture = settings.picture or settings.output / "exploitability.png"
    write(picture.with_suffix(".csv"), curves, exact)
    figure(curves, exact).savefig(picture, dpi=150)


def games() -> dict[str, set[str]]:
    """Every game of the experiment with the words of its own."""
    compared = compose([EXPERIMENT])[0].compare
    return {"OMPO": set(), **{name: set(words) for name, words in compared.items()}}


def ended(output: Path, own: set[str], seeds: list[int]) -> dict[int, RunFolder]:
    """A game's newest ended run with every seed."""
    found = {}
    for record in sorted(output.glob("*/*/*/run.json")):
        run = RunFolder(record.parent)
        mine = {word for word in run.record["words"] if word.startswith(("model", "pairwise", "data"))}
        if mine == own and run.results and run.results["seed"] in seeds:
            found[run.results["seed"]] = run
    return dict(sorted(found.items()))


def exploited(run: RunFolder) -> list[float]:
    """The exploitability of the policy that was imitated, and after every iteration."""
    imitated = RunFolder(Path(OmegaConf.load(run.path / "config.yaml").policy_weights).parent)
    before = imitated.results["metrics"][f"{STANDIN}/exploitability"]
    return [before, *curve(run.path / "metrics.csv", "val-standin/exploitability").values()]


def in_tables(game: str, points: int) -> list[float]:
    """The exploitability of the same steps with exact values, the first one of the uniform policy."""
    table = rps2()
    algorithm = MirrorDescent(beta=STEP, rounds=points, **EXACT[game])
    state, values = algorithm.begin(table), []
    for _ in range(points):
        if game in FIRST_TURN:
            state.log_policy[1] = uniform(table)[1]
        played = occupancy(table, state.log_policy)
        values.append(float(exploitability(table, played)))
        state = algorithm(table, state, played)
    return values


def report(found: dict[str, dict[int, RunFolder]], curves: dict[str, BySeed], exact: dict[str, list[float]]) -> None:
    """Print two tables as markdown: every game over its seeds, and every run by iteration."""
    print(f"| | mean of the last {LAST} | by seed | last | by seed | exact: last {LAST}, last | win rate, by seed |")
    print("|---|---|---|---|---|---|---|")
    for game, by_seed in curves.items():
        tails = [mean(values[-LAST:]) for values in by_seed.values()]
        lasts = [values[-1] for values in by_seed.values()]
        known = f"{mean(exact[game][-LAST:]):.3f}, {exact[game][-1]:.3f}" if game in exact else ""
        wins = ", ".join(won(run) for run in found[game].values())
        cells = [f"{mean(tails):.3f}", listed(tails), f"{mean(lasts):.3f}", listed(lasts), known, wins]
        print(f"| {game} | {' | '.join(cells)} |")
    points = max(map(len, exact.values()))
    print(f"\n| exploitability after iteration | {' | '.join(map(str, range(points)))} |\n|{'---|' * (points + 1)}")
    for game, by_seed in curves.items():
        rows = {f"{game}, seed {seed}": values for seed, values in by_seed.items()}
        for name, values in {**rows, **({f"{game}, exact": exact[game]} if game in exact else {})}.items():
            print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")


def listed(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def won(run: RunFolder) -> str:
    """The share of whole conversations won against the policy that was imitated, with its 95 % interval."""
    metrics = run.results["metrics"]
    share, low, high = (metrics[f"{STANDIN}/win_rate{end}"] for end in ("", "_low", "_high"))
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"


def write(path: Path, curves: dict[str, BySeed], exact: dict[str, list[float]]) -> None:
    """The curves, a row for each run and iteration."""
    runs = {(game, seed): values for game, by_seed in curves.items() for seed, values in by_seed.items()}
    runs |= {(game, "exact"): values for game, values in exact.items()}
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("game", "seed", "iteration", "exploitability"))
        for run, values in runs.items():
            rows.writerows((*run, iteration, f"{value:.6f}") for iteration, value in enumerate(values))


def figure(curves: dict[str, BySeed], exact: dict[str, list[float]]) -> Figure:
    """Exploitability by iteration, a panel a game: mean and range over seeds, every seed, and the tables."""
    made, axes = plt.subplots(2, 3, figsize=(10, 5.4), sharex=True, sharey=True, layout="constrained")
    for number, (axis, (game, by_seed)) in enumerate(zip(axes.flat, curves.items())):
        columns, color = list(zip(*by_seed.values())), f"C{number}"
        iterations = range(len(columns))
        axis.fill_between(iterations, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.2, lw=0)
        for values in by_seed.values():
            axis.plot(values, color=color, lw=0.6, alpha=0.6)
        axis.plot(iterations, list(map(mean, columns)), color=color, lw=2, label=f"policies, {len(by_seed)} seeds")
        if game in exact:
            axis.plot(exact[game], "k--", lw=1, label="exact tables")
        axis.set(title=game, yscale="log", ylim=(0.03, 1.2))
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8, loc="upper left", frameon=False)
    made.supxlabel("iteration")
    made.supylabel("exploitability (0: Nash)")
    return made


if __name__ == "__main__":
    main()
