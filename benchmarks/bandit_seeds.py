"""What seeds side by side cost: one run of KL-UCB with 20 seeds against 20 runs with one seed each.

python benchmarks/bandit_seeds.py --rounds 10000 --seeds 20

All 21 runs play the same stretch of 128 rounds before any goes on to the next: both sides meet the same machine. The
start of a program is not counted, of which 20 runs have 20.
"""

import argparse
import time

import numpy as np
import torch

from datamodules.bandit import Bandits
from datamodules.bandit_instances import linear, uniform
from datamodules.batches import Bandit, FreshFeatures
from lightning_modules.theory.bonus import Scaled
from lightning_modules.theory.decisions import regularized
from lightning_modules.theory.kl_bandits import KLUCB
from lightning_modules.theory.regularizer import KL

CLOCKS = {"wall clock": time.perf_counter, "processor time": time.process_time}


def method(data: Bandits, seeds: int, seed: int) -> KLUCB:
    """`seeds` copies of KL-UCB in the problem of these data."""
    made = KLUCB(1.0, Scaled(0.25, 0.05), regularized, KL(), 1.0, seeds, seed, 512, [])
    made.meet(data)
    return made


def seconds(methods: list[KLUCB], rounds: list[int]) -> tuple[np.ndarray, torch.Tensor]:
    """What these rounds take in all methods, by every clock, and the regret of the first copy of the first method."""
    began = np.array([clock() for clock in CLOCKS.values()])
    regrets = [played.play(rounds)["regret"] for played in methods]
    return np.array([clock() for clock in CLOCKS.values()]) - began, regrets[0][0]


def compare(instance: Bandit | FreshFeatures, rounds: int, seeds: int) -> None:
    """Both sides stretch by stretch; print seconds and ratios, and check that the first seed plays the same in both."""
    data = Bandits("bandit", instance, None, rounds, 128, None)
    together, alone = [method(data, seeds, 1)], [method(data, 1, 1 + number) for number in range(seeds)]
    spent = []
    for number in range(len(data.chunks)):
        stretch = data.chunks[number]["rounds"].tolist()
        (side_by_side, regret), (one_by_one, same) = seconds(together, stretch), seconds(alone, stretch)
        assert torch.equal(regret, same), "a seed plays the same alone"
        spent.append((len(stretch), side_by_side, one_by_one))
    for place, clock in enumerate(CLOCKS):
        sides = [sum(row[side][place] for row in spent) for side in (1, 2)]
        ratios = [row[2][place] / row[1][place] for row in spent if row[0] == 128]
        low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
        print(
            f"{instance.name}: {seeds} seeds, {rounds} rounds, {clock}: {sides[0]:.2f} s side by side, "
            f"{sides[1]:.2f} s one by one; "
            f"ratio {sides[1] / sides[0]:.1f}, of stretches {middle:.1f} [{low:.1f}, {high:.1f}]",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for instance in (uniform(5, 0.5), linear(20, 5, 4, 0.5, 0)):
            compare(instance, given.rounds, given.seeds)


if __name__ == "__main__":
    main()
