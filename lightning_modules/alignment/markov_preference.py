"""MPO and OMPO: preferences about every turn of a conversation (arXiv 2502.12678)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.batches import Pair, Prompt, Trajectory
from lightning_modules.alignment import labelling
from lightning_modules.alignment.conversation import Line, after, begun, to_the_end
from lightning_modules.alignment.extrapolation import fitted_weights
from lightning_modules.alignment.generation import Sampling
from lightning_modules.alignment.iterative import SEEDS_APART, Iterative, with_weights
from lightning_modules.alignment.markov_targets import advantages, counted_turns, q_values, tie
from lightning_modules.alignment.oracle import Remembered, labels_folder
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.rollout import cache_key, load

OPPONENTS = ("regenerate", "match")


@dataclass(frozen=True)
class State:
    """A turn of a conversation: what was said before it, K answers to that, and each with what follows it.

    `left` are the turns from here to the end.
    """

    prompt: Prompt
    answers: list[Trajectory]
    lines: list[Line]
    left: int

    @property
    def texts(self) -> list[str]:
        return [line.text for line in self.lines]

    @property
    def ended(self) -> list[bool]:
        return [line.ended for line in self.lines]


@dataclass(frozen=True)
class Sampler:
    """Who answers in an iteration: the fingerprint of the weights, and the policy while it is at hand."""

    weights: str
    policy: Policy | None
    sampling: Sampling


class MarkovPreference(Iterative):
    """Every turn of a conversation is a state with K answers; the best and the worst are regressed onto their Q.

    The conversation goes on from the first answer with what the user says next (`Prompt.script`). `returns="rollout"`
    continues all K to the end and counts the turns they win, `one_step` counts the turn itself. With `optimistic`
    (OMPO) the answers are also held against K of the previous policy: drawn anew at the same states (`regenerate`, with
    a copy of its weights) or those that it gave in the same turn of the same conversation (`match`, as the paper's text
    implies, whose states differ after the first turn). `tau` is "center", or a number (the paper's runs: 0).
    """

    def __init__(
        self,
        optimistic: bool,
        returns: str,
        opponent_states: str,
        tau: str | float,
        **iterative: Any,
    ) -> None:
        super().__init__(**iterative)
        counted_turns(returns, 1)
        if opponent_states not in OPPONENTS:
            raise ValueError(f"model.opponent_states={opponent_states}: there are {', '.join(OPPONENTS)}")
        if isinstance(tau, str) and tau != "center":
            raise ValueError(f"model.tau={tau}: expected center or a number")
        if self.reference != "previous":
            raise ValueError(f"model.reference={self.reference}: a step of mirror descent is from the previous policy")
        self.optimistic, self.returns, self.opponent_states, self.tau = optimistic, returns, opponent_states, tau
        self.answered_before = ""  # the fingerprint of the policy of the iteration before

    def advance(self, number: int) -> None:
        """Keep the weights that are about to answer: the next iteration's opponents."""
        self.answered_before = self.answered_by
        if self.optimistic and self.opponent_states == "regenerate":
            self.kept["before"] = self.kept.pop("now", {})
            self.kept["now"] = fitted_weights(self.policy)

    def iterate(self, prompts: list[Prompt], identity: dict[str, Any], folder: Path) -> list[Pair]:
        number = self.trainer.global_step // self.steps_per_iteration
        self.oracle.to(self.device)
        self._meet_opponents(identity, folder)
        policy = self._begin(number) if number >= self.begun else None
        now = Sampler(self.answered_by, policy, self._sampling(number))
        states = self._conversations(prompts, now, identity, folder)
        values = self._values(number, states, prompts, identity, folder)
        pairs = [pair for state, value in zip(states, values) for pair in self._pair(state, *value)]
        if not pairs:
            raise ValueError(
                f"iteration {number + 1}: all answers to a prompt are worth the same; raise rollouts.k, "
                "rollouts.temperature or data.max_response"
            )
        self._note(number, [t for state in states for t in state.answers], pairs, len(states))
        self._clock = None
        return pairs

    def _sampling(self, number: int) -> Sampling:
        return replace(self.behaviour, seed=self.behaviour.seed + SEEDS_APART * number)

    # Conversations

    def _conversations(
        self, prompts: list[Prompt], sampler: Sampler, identity: dict[str, Any], folder: Path
    ) -> list[State]:
        """The states of every conversation, turn by turn, which go on from the first answer to each.

        A conversation ends where its next prompt would be longer than `data.max_prompt`, as it does in `to_the_end`.
        """
        states: list[State] = []
        data, begun, stopped = self.trainer.datamodule, len(prompts), 0
        while prompts:
            found = self._states(prompts, sampler, identity, folder)
            states += found
            following = [after(s.prompt, s.answers[0].response, "", data) for s in found if s.prompt.script]
            prompts = [prompt for prompt in following if len(prompt.ids) <= data.max_prompt]
            stopped += len(following) - len(prompts)
        if stopped:
            rank_zero_warn(
                f"{stopped} of {begun} conversations end before the user's script does, where the next prompt is over "
                f"data.max_prompt={data.max_prompt}: raise that, or lower rollouts.max_new"
            )
        return states

    def _states(self, prompts: list[Prompt], sampler: Sampler, identity: dict[str, Any], folder: Path) -> list[State]:
        """K answers in every state, and with `rollout` one continuation of each to the end of the script."""
        k = self.rollouts["k"]
        answers = self._answers(prompts, k, sampler, identity, folder)
        starts = [prompt for prompt in prompts for _ in range(k)]
        lines = [begun(start, t.sample, t.response, t.finished) for start, t in zip(starts, answers)]
        if self.returns == "rollout":

            def reply(following: list[Prompt]) -> list[tuple[str, bool]]:
                said = self._answers(following, 1, sampler, identity, folder)
                return [(t.response, t.finished) for t in said]

            lines = to_the_end(lines, self.trainer.datamodule, reply)
        return [
            State(prompt, answers[at : at + k], lines[at : at + k], 1 + len(prompt.script))
            for at, prompt in zip(range(0, len(lines), k), prompts)
        ]

    def _answers(
        self, prompts: list[Prompt], k: int, sampler: Sampler, identity: dict[str, Any], folder: Path
    ) -> list[Trajectory]:
        if sampler.policy is not None:
            self.sample(sampler.policy, prompts, k, sampler.sampling, identity, folder)
        return load(folder / cache_key(sampler.weights, prompts, k, sampler.sampling, identity))

    # Values

    def _values(
        self, number: int, states: list[State], prompts: list[Prompt], identity: dict[str, Any], folder: Path
    ) -> list[tuple[Float[Tensor, " k"], Float[Tensor, " k"]]]:
        """For every state the win rates and the advantages of its answers."""
        groups = [
            [replace(t, response=text, finished=ended) for t, text, ended in zip(s.answers, s.texts, s.ended)]
            for s in states
        ]
        tables = self._tables([s.prompt for s in states], groups, folder)
        before = self._tables_before(number, states, prompts, identity, folder)
        found = []
        for state, table, against in zip(states, tables, before):
            turns = counted_turns(self.returns, state.left)
            previous = None if against is None else q_values(against, turns)
            found.append((table.mean(1), advantages(q_values(table, turns), previous, tie(turns), self.tau)))
        return found

    def _tables_before(
        self, number: int, states: list[State], prompts: list[Prompt], identity: dict[str, Any], folder: Path
    ) -> list[Float[Tensor, "k opponents"] | None]:
        """Preferences over the answers of the previous policy; None in the first iteration, and for MPO.

        With `match` also where the previous policy's conversation had ended before that turn.
        """
        if not self.optimistic or number == 0:
            return [None] * len(states)
        if self.opponent_states == "match":
            sampler = Sampler(self.answered_before, None, self._sampling(number - 1))
            earlier = {s.prompt.id: s for s in self._conversations(prompts, sampler, identity, folder)}
            met = [state for state in states if state.prompt.id in earlier]
            opponents = [earlier[state.prompt.id] for state in met]
        else:
            met = states
            # numbers of their own: at the first turn these would be the answers of the iteration before again
            sampling = replace(self._sampling(number), seed=self._sampling(number).seed + SEEDS_APART // 2)
            policy = with_weights(self.policy, self.kept["before"])
            sampler = Sampler(policy.fingerprint(), policy, sampling)
            opponents = [s for depth in _by_turn(states) for s in self._states(depth, sampler, identity, folder)]
        against = dict(zip((state.prompt.id for state in met), self._against(met, opponents, folder)))
        return [against.get(state.prompt.id) for state in states]

    def _against(self, states: list[State], opponents: list[State], folder: Path) -> list[Float[Tensor, "k opponents"]]:
        rows = [
            (state.prompt, one, other, first, second)
            for state, rival in zip(states, opponents)
            for one, first in zip(state.texts, state.ended)
            for other, second in zip(rival.texts, rival.ended)
        ]
        first, second = (torch.tensor([row[place] for row in rows]) for place in (3, 4))
        judged = [row[:3] for row in rows if row[3] and row[4]]
        oracle = Remembered(self.oracle, labels_folder(folder, self.oracle))
        known = oracle.prefer(*(list(column) for column in zip(*judged))) if judged else torch.zeros(0)
        chances = torch.full((len(rows),), 0.5).masked_scatter(first & second, known)
        k = self.rollouts["k"]
        return list(labelling.cut_off_loses(chances, first, second).view(len(states), k, k))

    def _pair(self, state: State, rates: Float[Tensor, " k"], value: Float[Tensor, " k"]) -> list[Pair]:
        """The best and the worst answer by win rate, each with the advantage that its log-ratio is to be."""
        best, worst = int(rates.argmax()), int(rates.argmin())
        two = state.answers[best], state.answers[worst]
        if rates[best] == rates[worst] or two[0].response == two[1].response:
            return []
        return [
            Pair(
                prompt_id=state.prompt.id,
                prompt_ids=state.prompt.ids,
                responses=(two[0].response_ids, two[1].response_ids),
                label=1.0,
                value=(float(value[best]), float(value[worst])),
                lp_ref=(two[0].lp_ref, two[1].lp_ref),
            )
        ]

    # Going on

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["iterative"]["answered_before"] = self.answered_before

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.answered_before = checkpoint["iterative"]["answered_before"]


def _by_turn(states: list[State]) -> list[list[Prompt]]:
    """The prompts of the states, those of one turn together, in their order."""
    turns: dict[int, list[Prompt]] = {}
    for state in states:
        turns.setdefault(len(state.prompt.messages), []).append(state.prompt)
    return list(turns.values())
