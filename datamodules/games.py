"""Games as tables: rock-paper-scissors, the two-stage RPS-2 with its closed-form equilibrium, random ones, a file."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batches import Game
from datamodules.rounds import Rounds


class Games(Rounds):
    """Rounds of a game, or of several games of one shape side by side."""

    def __init__(self, name: str, game: Game, rounds: int, chunk: int, limit: int | None) -> None:
        digest = hashlib.sha256(game.payoff.numpy().tobytes() + game.transition.numpy().tobytes()).hexdigest()
        super().__init__(name, "the game's tables", digest, rounds, chunk, limit)
        self.game = game


def cycle(a: float, b: float, c: float) -> Float[Tensor, "3 3"]:
    """[[0, -a, b], [a, 0, -c], [-b, c, 0]]: a cyclic zero-sum game, whose equilibrium is proportional to (c, b, a)."""
    return torch.tensor([[0, -a, b], [a, 0, -c], [-b, c, 0]], dtype=torch.float64)


def rps(a: float, b: float, c: float) -> Game:
    """Rock-paper-scissors with the payoff 1/2 + 1/2 cycle(a, b, c); a, b, c in (0, 1]."""
    nash = torch.tensor([c, b, a], dtype=torch.float64) / (a + b + c)
    payoff = (0.5 + cycle(a, b, c) / 2).reshape(1, 1, 3, 1, 3)
    return Game(payoff, torch.zeros(0, 1, 3, 1, dtype=torch.float64), nash.reshape(1, 1, 3))


def rps2() -> Game:
    """Two stages: one's own first action is the second state, and what it is worth there makes the future count.

    The equilibrium is (1/2, 1/6, 1/3) at first and (1/2, 1/4, 1/4) in every second state. That of the first stage by
    itself, (4/9, 2/9, 1/3), can be exploited by 2/45.
    """
    payoff = torch.full((2, 3, 3, 3, 3), 0.5, dtype=torch.float64)
    payoff[0] += 0.5 * cycle(0.6, 0.4, 0.8)[None, :, None, :]
    payoff[1] += 0.25 * cycle(0.5, 0.5, 1.0)[None, :, None, :] + 0.25 * cycle(0.4, 0.0, 0.8)[:, None, :, None]
    transition = torch.eye(3, dtype=torch.float64).expand(1, 3, 3, 3).contiguous()
    nash = torch.tensor([[1 / 2, 1 / 6, 1 / 3], [1 / 2, 1 / 4, 1 / 4]], dtype=torch.float64)
    return Game(payoff, transition, nash[:, None].expand(2, 3, 3).contiguous())


def random_games(horizon: int, states: list[int], actions: list[int], games: int, seed: int) -> Game:
    """Games of `horizon` stages with random moves and payoffs, all of one size.

    The numbers of states and actions are drawn uniformly from the ranges [least, most]. Successors are
    Dirichlet(1/2), payoffs 1/2 + (U - U^T)/2 with U uniform in [0, 1]. Raises ValueError for an empty range.
    """
    draw = np.random.default_rng(seed)
    for key, (least, most) in {"states": states, "actions": actions}.items():
        if not 1 <= least <= most:
            raise ValueError(f"data.game.{key}=[{least}, {most}]: expected 1 <= least <= most")
    s, a = (int(draw.integers(least, most + 1)) for least, most in (states, actions))
    uniform = draw.random((games, horizon, s * a, s * a))
    payoff = 0.5 + (uniform - uniform.swapaxes(-1, -2)) / 2
    moves = draw.dirichlet([0.5] * s, size=(games, horizon - 1, s, a))
    return Game(torch.from_numpy(payoff).reshape(games, horizon, s, a, s, a), torch.from_numpy(moves))


def from_file(path: str) -> Game:
    """The tables `payoff` and `transition` of an .npz file, shaped as in `Game`.

    Raises FileNotFoundError, or ValueError where they are not those of a constant-sum game.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.game.path={path} does not exist: give an .npz with payoff and transition")
    tables = np.load(path, allow_pickle=False)
    missing = {"payoff", "transition"} - set(tables)
    if missing:
        raise ValueError(
            f"{path} has no table {min(missing)}: save it with numpy.savez(path, payoff=..., transition=...)"
        )
    payoff, transition = (torch.from_numpy(tables[name]).double() for name in ("payoff", "transition"))
    return checked(payoff, transition, path)


def checked(payoff: Tensor, transition: Tensor, name: str) -> Game:
    """The game of these tables; ValueError, naming `name`, where they do not make one."""
    *games, horizon, s, a = payoff.shape[:-2] if payoff.ndim >= 5 else (0, 0, 0)
    if horizon < 1 or payoff.shape[-2:] != (s, a) or transition.shape != (*games, horizon - 1, s, a, s):
        raise ValueError(
            f"{name}: payoff {tuple(payoff.shape)} and transition {tuple(transition.shape)} do not fit together: give "
            "(H, S, A, S, A) with H >= 1 and (H - 1, S, A, S)"
        )
    table = payoff.reshape(*games, horizon, s * a, s * a)
    if not ((table + table.mT - 1).abs() < 1e-9).all():
        raise ValueError(f"{name}: payoff[s, a, t, b] + payoff[t, b, s, a] is not 1 everywhere: make it constant-sum")
    if not (((transition.sum(-1) - 1).abs() < 1e-9).all() and (transition >= 0).all() and (payoff >= 0).all()):
        raise ValueError(f"{name}: payoffs must lie in [0, 1], and every row of transition must be a distribution")
    return Game(payoff, transition)
