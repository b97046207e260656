"""Simulations of bandits played without a trainer, as its steps would play them."""

from typing import Any

import torch

from datamodules.bandit import Bandits
from lightning_modules.theory import decisions
from lightning_modules.theory.bonus import Bonus, Scaled, Theory
from lightning_modules.theory.feedback import Rewards
from lightning_modules.theory.kl_bandits import KLUCB
from lightning_modules.theory.kl_lsvi import KLLSVIUCB
from lightning_modules.theory.offline_bandits import OfflineBandit, TwoStage
from lightning_modules.theory.regularizer import KL
from lightning_modules.theory.simulation import Simulation


def bonus(c: float | str) -> Bonus:
    """`c` confidence widths, or the theory's."""
    return Theory(0.05) if c == "theory" else Scaled(c, 0.05)


def served(instance: Any, rounds: int, chunk: int, log: str | None = None) -> Bandits:
    """The data of a simulation."""
    return Bandits("bandit", instance, log, rounds, chunk, None)


def play(method: Simulation, data: Bandits, steps: slice = slice(None)) -> Simulation:
    """All steps of these data, or some of them."""
    for number in range(len(data.chunks))[steps]:
        rounds = data.chunks[number]["rounds"].tolist()
        method.rounds.append(rounds[-1] + 1)
        with torch.no_grad():
            for name, values in method.play(rounds).items():
                method.curves.setdefault(name, []).append(values)
    return method


def kl_ucb(instance: Any, eta: float, c: float | str, copies: int, rounds: int, **other: Any) -> KLUCB:
    """A run of KL-UCB, or of a control; slopes over the last five doublings."""
    data = served(instance, rounds, 128)
    method = online(eta, c, copies, rounds // 32, **other)
    method.meet(data)
    return play(method, data)


def online(eta: float, c: float | str, copies: int, fit_from: int, **other: Any) -> KLUCB:
    """KL-UCB before it has met its data."""
    settings = {"decision": decisions.regularized, "regularizer": KL(), "ridge": 1.0, "seed": 1, "at": []} | other
    return KLUCB(eta=eta, bonus=bonus(c), copies=copies, fit_from=fit_from, **settings)


def kl_lsvi_ucb(instance: Any, eta: float, c: float | str, copies: int, rounds: int, **other: Any) -> KLLSVIUCB:
    """A run of KL-LSVI-UCB, or of a control; slopes over the last four doublings."""
    settings = {"decision": decisions.regularized, "seed": 1, "at": []} | other
    data = served(instance, rounds, 64)
    method = KLLSVIUCB(eta=eta, bonus=bonus(c), copies=copies, fit_from=rounds // 16, **settings)
    method.meet(data)
    return play(method, data)


def offline(
    instance: Any, eta: float, c: float | str, copies: int, samples: int, first: float | None = None, **other: Any
) -> OfflineBandit:
    """What is learned from logs; with `first`, in two stages."""
    settings = {"feedback": Rewards(), "decision": decisions.regularized, "regularizer": KL(), "seed": 1} | other
    settings |= {"eta": eta, "bonus": bonus(c), "copies": copies, "fit_from": 512, "eps": [], "at": []}
    method = OfflineBandit(**settings) if first is None else TwoStage(first, **settings)
    data = served(instance, samples, samples)
    method.meet(data)
    return play(method, data)


def at(method: Simulation, name: str, round_: int) -> float:
    """The mean of a measurement after a round."""
    return float(method.curves[name][method.rounds.index(round_)].mean())
