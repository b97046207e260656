"""Learning a Markov game exactly, and how exploitable the result is (arXiv 2502.12678)."""

from collections.abc import Callable
from typing import ClassVar

import lightning as L

from datamodules.batches import Game
from lightning_modules.theory.markov_game import exploitability, occupancy
from lightning_modules.theory.mirror_descent import Algorithm, State
from lightning_modules.theory.simulation import Measured, Simulation


class GameSolver(Simulation):
    """Rounds of `algorithm` against itself; the result is the policy whose occupancy is the average over the rounds.

    `average` is the exploitability of that policy, `last` that of what played the last round. (Averaging policies
    instead of occupancies is something else as soon as there is more than one stage.)
    """

    headline: ClassVar[tuple[str, str]] = ("val/average", "min")
    columns: ClassVar[dict[str, Callable[[float], str]]] = {
        **{name: "{:.2e}".format for name in ("average@", "last@")},
        **{name: "{:.2f}".format for name in ("average_slope", "last_slope")},
    }
    caption: ClassVar[str] = "exploitability (half of the duality gap) of the average and of the last policy by round"
    log_log: ClassVar[tuple[str, ...]] = ("average", "last")

    def __init__(self, algorithm: Algorithm, at: list[int]) -> None:
        super().__init__(at)
        self.algorithm = algorithm

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the game from the data."""
        super().meet(data)
        if not hasattr(data, "game"):
            raise ValueError(f"data={data.name} has no game: take data=rps2, rps, random_games or game")
        state = self.algorithm.begin(data.game)
        tables = {"payoff": data.game.payoff, "transition": data.game.transition}
        for name, table in {**tables, **state._asdict(), "total": state.log_policy * 0}.items():
            self.register_buffer(name, table.clone(), persistent=name not in tables)

    def play(self, rounds: list[int]) -> Measured:
        game, state = Game(self.payoff, self.transition), State(self.log_policy, self.memory)
        for _ in rounds:
            played = occupancy(game, state.log_policy)
            self.total += played
            state = self.algorithm(game, state, played)
        self.log_policy.copy_(state.log_policy)
        self.memory.copy_(state.memory)
        average = self.total / (rounds[-1] + 1)
        return {
            "average": exploitability(game, average).reshape(-1),
            "last": exploitability(game, played).reshape(-1),
        }
