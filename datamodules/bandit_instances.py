"""Bandits of known reward: the ones whose rates have a closed form, hard ones, random ones, linear ones, a process."""

import math

import numpy as np
import torch

from datamodules.batches import Bandit, DecisionProcess, FreshFeatures


def table(
    name: str,
    reward: list[float] | np.ndarray | torch.Tensor,
    reference: list[float] | np.ndarray | torch.Tensor,
    noise: float,
    contexts: torch.Tensor | None = None,
    **more,
) -> Bandit:
    """The bandit of these tables, of one context where they are rows; ValueError where they do not make one."""
    reward, reference = (torch.as_tensor(values, dtype=torch.float64) for values in (reward, reference))
    reward, reference = (values[None] if values.ndim == 1 else values for values in (reward, reference))
    m, k = reference.shape
    if reward.shape[-2:] != (m, k) or k < 2:
        raise ValueError(
            f"{name}: rewards {tuple(reward.shape)} and reference policy {tuple(reference.shape)} must be tables of "
            "the same contexts and actions, with two actions or more"
        )
    if not reward.isfinite().all():
        raise ValueError(f"{name}: the reward of {_place(~reward.isfinite())} is {reward[~reward.isfinite()][0]}")
    check_policy(name, reference)
    check_noise(noise)
    contexts = torch.full((m,), 1 / m, dtype=torch.float64) if contexts is None else contexts
    if contexts.shape != (m,) or not (contexts > 0).all() or abs(float(contexts.sum()) - 1) > 1e-9:
        raise ValueError(f"{name}: the probabilities of the {m} contexts must be positive and sum to 1")
    return Bandit(name, reward, reference.log(), contexts, noise, **more)


def check_policy(name: str, reference: torch.Tensor) -> None:
    """Raise ValueError, naming the place, unless every row is a distribution with positive probabilities."""
    if not (reference > 0).all():
        raise ValueError(
            f"{name}: the reference policy has probability {float(reference[~(reference > 0)][0]):g} at "
            f"{_place(~(reference > 0))}: no ratio to it is defined, so give it a positive one or leave the action out"
        )
    off = (reference.sum(-1) - 1).abs()
    if off.max() > 1e-9:
        row = int(off.argmax())
        raise ValueError(
            f"{name}: the reference policy sums to {float(reference[row].sum()):.12g} in context {row}: make it 1"
        )


def check_noise(noise: float) -> None:
    """Raise ValueError unless the standard deviation is one."""
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"data.instance.noise={noise} must be a standard deviation, 0 or more")


def _place(wrong: torch.Tensor) -> str:
    *_, context, action = wrong.nonzero()[0].tolist()
    return f"context {context}, action {action}"


def uniform(actions: int, noise: float) -> Bandit:
    """Rewards evenly spaced in [0, 1] and a uniform reference."""
    _several("actions", actions)
    return table(f"{actions} arms", np.linspace(0, 1, actions), np.full(actions, 1 / actions), noise)


def skewed(reward: list[float], p: float | None, coverage: float | None, eta: float, noise: float) -> Bandit:
    """The reference takes action 0 with probability `p` and the others equally often.

    Instead of `p` the coverage C = max pi*/pi0 of the optimal policy can be given, of which `eta` has a part. It is at
    most that of p = 0. Raises ValueError where it cannot be reached.
    """
    _several("reward, the number of them", len(reward))
    if (p is None) == (coverage is None):
        raise ValueError(f"data.instance.p={p} and data.instance.coverage={coverage}: give one of them, the other null")
    p = _probability(np.asarray(reward), coverage, eta) if p is None else p
    if not 0 < p < 1:
        raise ValueError(f"data.instance.p={p} must lie in (0, 1): the reference policy takes every action")
    reference = np.full(len(reward), (1 - p) / (len(reward) - 1))
    reference[0] = p
    return table(f"{len(reward)} arms, pi0(0) = {p:.3g}", reward, reference, noise)


def _probability(reward: np.ndarray, coverage: float, eta: float) -> float:
    """p with max pi*/pi0 = exp(eta max r) / Z = coverage, where Z = p exp(eta r_0) + (1 - p) mean exp(eta r_others)."""
    weights = np.exp(eta * (reward - reward.max()))
    others = weights[1:].mean()
    most = 1 / others
    if weights[0] < 1:
        raise ValueError(
            "data.instance.coverage needs the best reward at action 0: sort data.instance.reward, or give p"
        )
    if not 1 < coverage < most:
        raise ValueError(
            f"data.instance.coverage={coverage:g} is infeasible: at eta={eta:g} these rewards allow values between 1 "
            f"and {most:.4g}, both excluded"
        )
    return float((1 / coverage - others) / (1 - others))


def tail(actions: int, rare: float, noise: float) -> Bandit:
    """A good action (mean 0.8, taken half of the time), a fair one (0.5), and a tail of bad ones, each taken rarely."""
    bad = actions - 2
    if bad < 1 or not 0 < rare * bad < 0.5:
        raise ValueError(
            f"data.instance.actions={actions} and data.instance.rare={rare}: the {bad} bad actions must be one or more "
            "and have less than half of the probability together"
        )
    return table(
        f"{actions} arms, {bad} of them bad and taken with probability {rare:g}",
        [0.8, 0.5] + [0.0] * bad,
        [0.5, 0.5 - rare * bad] + [rare] * bad,
        noise,
    )


def minimax(actions: int, horizons: list[int], noise: float) -> Bandit:
    """For every horizon T a bandit of its own: one arm is better than the others by sqrt(actions / T)."""
    _several("actions", actions)
    if not horizons or min(horizons) < 4 * actions:
        raise ValueError(
            f"data.instance.horizons={horizons}: give some, each at least {4 * actions}, so that gaps are small"
        )
    reward = np.full((len(horizons), 1, actions), 0.5)
    reward[..., 0] += np.sqrt(actions / np.asarray(horizons))[:, None]
    return table(
        f"{actions} arms, a gap of sqrt({actions}/T)",
        reward,
        np.full((1, actions), 1 / actions),
        noise,
        horizons=tuple(horizons),
    )


def random_answers(answers: int, scale: float, problem: int, noise: float = 0.0) -> Bandit:
    """`answers` with uniform rewards in [0, `scale`], the best first, and a random reference.

    Drawn from NumPy's default generator at `problem`: rewards, then the logits of the policy, standard normal.
    """
    if answers < 2 or not scale > 0:
        raise ValueError(f"data.instance.answers={answers} must be at least 2 and data.instance.scale={scale} positive")
    draw = np.random.default_rng(problem)
    reward = torch.from_numpy(scale * np.sort(draw.uniform(0, 1, answers))[::-1].copy())[None]
    log_reference = torch.from_numpy(draw.normal(size=answers)).log_softmax(-1)[None]
    name = f"problem {problem} of {answers} answers"
    return Bandit(name, reward, log_reference, torch.ones(1, dtype=torch.float64), noise, (0.0, scale))


def linear(contexts: int, actions: int, features: int, noise: float, problem: int) -> Bandit | FreshFeatures:
    """Features uniform on the unit sphere and rewards <theta, feature>, theta on the sphere too; a uniform reference.

    `contexts` = 0 draws new features in every round. Everything else is drawn from NumPy's default generator at
    `problem`: theta, then the features.
    """
    _several("actions", actions)
    if features < 1 or contexts < 0:
        raise ValueError(f"data.instance.features={features} must be positive and contexts={contexts} not negative")
    check_noise(noise)
    draw = np.random.default_rng(problem)
    theta = _unit(draw.normal(size=features))
    if not contexts:
        name = f"{actions} new features of {features} numbers each round"
        return FreshFeatures(name, torch.from_numpy(theta), actions, noise, (-1.0, 1.0))
    phi = _unit(draw.normal(size=(contexts, actions, features)))
    return table(
        f"{contexts} contexts, {actions} actions, linear in {features} features",
        phi @ theta,
        np.full((contexts, actions), 1 / actions),
        noise,
        reward_range=(-1.0, 1.0),
        features=torch.from_numpy(phi),
    )


def mdp(steps: int, states: int, actions: int, noise: float, problem: int) -> DecisionProcess:
    """Successors from Dirichlet(0.3), three in ten rewards uniform in [0, 1] and the others 0, a uniform reference.

    It starts in state 0. Drawn from NumPy's default generator at `problem`.
    """
    _several("actions", actions)
    if steps < 1 or states < 1:
        raise ValueError(f"data.instance.steps={steps} and data.instance.states={states} must be positive")
    check_noise(noise)
    draw = np.random.default_rng(problem)
    moves = draw.dirichlet([0.3] * states, size=(steps - 1, states, actions))
    shape = (steps, states, actions)
    reward = draw.uniform(size=shape) * (draw.uniform(size=shape) < 0.3)
    start = torch.zeros(states, dtype=torch.float64)
    start[0] = 1
    return DecisionProcess(
        f"{steps} steps, {states} states, {actions} actions",
        torch.from_numpy(reward),
        torch.from_numpy(moves),
        torch.full(shape, -math.log(actions), dtype=torch.float64),
        start,
        noise,
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _several(key: str, count: int) -> None:
    if count < 2:
        raise ValueError(f"data.instance.{key}={count}: with fewer than two actions there is nothing to choose")
