"""What seeds side by side cost: one run of KL-UCB with 20 seeds against 20 runs with one seed each, interleaved.

python benchmarks/bandit_seeds.py --rounds 10000 --seeds 20 --repeats 3
"""

import argparse
import statistics
import time

import torch

from datamodules.bandit import Bandits
from datamodules.bandit_instances import linear, uniform
from datamodules.batches import Bandit, FreshFeatures
from lightning_modules.theory.bonus import Scaled
from lightning_modules.theory.decisions import regularized
from lightning_modules.theory.kl_bandits import KLUCB
from lightning_modules.theory.regularizer import KL


def run(instance: Bandit | FreshFeatures, rounds: int, seeds: int) -> tuple[float, torch.Tensor]:
    """Seconds of all rounds, and the regret of every seed."""
    data = Bandits("bandit", instance, None, rounds, 128, None)
    method = KLUCB(1.0, Scaled(0.25, 0.05), regularized, KL(), 1.0, seeds, 1, 512, [])
    method.meet(data)
    began = time.perf_counter()
    with torch.no_grad():
        for number in range(len(data.chunks)):
            regret = method.play(data.chunks[number]["rounds"].tolist())["regret"]
    return time.perf_counter() - began, regret


def main() -> None:
    """Interleave, check that the first seed has the same regret both ways, print seconds and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for instance in (uniform(5, 0.5), linear(20, 5, 4, 0.5, 0)):
        run(instance, 256, given.seeds)
        ratios, together, apart = [], [], []
        for _ in range(given.repeats):
            seconds, regret = run(instance, given.rounds, given.seeds)
            single = [run(instance, given.rounds, 1) for _ in range(given.seeds)]
            assert torch.equal(single[0][1][0], regret[0]), "a seed plays the same alone"
            together.append(seconds)
            apart.append(sum(one for one, _ in single))
            ratios.append(apart[-1] / seconds)
        print(
            f"{instance.name}: {given.seeds} seeds, {given.rounds} rounds: {statistics.median(together):.2f} s side by "
            f"side, {statistics.median(apart):.2f} s one by one; ratio {statistics.median(ratios):.1f} "
            f"[{min(ratios):.1f}, {max(ratios):.1f}] of {given.repeats}"
        )


if __name__ == "__main__":
    main()
