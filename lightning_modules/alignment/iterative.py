"""The outer loop of a preference game: sample answers, have an oracle compare them, learn from the pairs, repeat."""

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.batches import Pair, PreferenceBatch, Prompt, Trajectory
from lightning_modules.alignment import labelling
from lightning_modules.alignment.conversation import Line, begun, to_the_end
from lightning_modules.alignment.extrapolation import fitted_weights
from lightning_modules.alignment.game_evaluation import GameEvaluation
from lightning_modules.alignment.generation import Sampling
from lightning_modules.alignment.oracle import Oracle, Remembered, labels_folder
from lightning_modules.alignment.policy import Policy, unsharded
from lightning_modules.alignment.policy_method import per_cent
from lightning_modules.alignment.preference import Compared, Preference
from lightning_modules.alignment.rollout import cache_key, load, rollout, score_responses, stored
from lightning_modules.sharding import placed

REFERENCES = ("previous", "initial", "ema")
SEEDS_APART = 1_000_003  # between iterations


class Iterative(Preference):
    """A loss of pairs in a loop (iterative DPO, arXiv 2312.11456; SPPO, arXiv 2405.00675; GPO, arXiv 2410.02197).

    An iteration is a pass of `trainer.max_steps / iterations` steps. At its start K = `rollouts.k` answers to every
    prompt are sampled from the weights of that moment, `oracle` compares them, and `pairs` are made of each prompt's
    table. The reference is the policy that answered (`previous`), the one that the run started from (`initial`), or an
    average of those that answered (`ema`, with weight `ema` on the past). With `restart_optimizer` each iteration has
    moments and a schedule of its own: stale moments would be momentum that nobody asked for.

    Answers and labels are on disk under the fingerprint of the weights that answered, which is part of a checkpoint: a
    run that goes on samples and asks for nothing a second time.
    """

    labels: ClassVar[bool] = True
    headline: ClassVar[tuple[str, str]] = ("val/win_rate", "max")
    unchecked: ClassVar[tuple[str, str]] = headline

    def __init__(
        self,
        oracle: Oracle,
        iterations: int,
        reference: str,
        ema: float,
        pairs: str,
        label: str,
        winrate: str,
        value: str,
        restart_optimizer: bool,
        **preference: Any,
    ) -> None:
        super().__init__(**preference)
        labelling.choices(pairs=pairs, label=label, winrate=winrate, value=value)
        if reference not in REFERENCES:
            raise ValueError(f"model.reference={reference}: there are {', '.join(REFERENCES)}")
        if not 0 <= ema < 1:
            raise ValueError(f"model.ema={ema} must be in [0, 1): the weight of the past in the reference")
        if self.rollouts["k"] < 2:
            raise ValueError(f"rollouts.k={self.rollouts['k']}: a pair needs two answers to a prompt; take 2 or more")
        if iterations < 1:
            raise ValueError(f"model.iterations={iterations} must be positive")
        self.oracle, self.iterations, self.reference, self.ema = oracle, iterations, reference, ema
        self.rule, self.label, self.winrate, self.value = pairs, label, winrate, value
        self.restart_optimizer = restart_optimizer
        self.begun = 0  # iterations whose answers are or are being sampled
        self.answered_by = ""  # the fingerprint of the policy that answered last
        self.kept: dict[str, dict[str, Tensor]] = {}  # weights of other moments, whole and in float32
        self.opponents: dict[str, list[tuple[Trajectory, Line]]] = {}
        self.sampled: dict[str, float] = {}

    def meet(self, data: Any) -> None:
        super().meet(data)
        self.oracle.meet(data)
        self.columns = {"win_rate": per_cent, **self.columns}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            steps = self.trainer.max_steps
            if steps < 1 or steps % self.iterations:
                raise ValueError(
                    f"trainer.max_steps={steps} is no multiple of model.iterations={self.iterations}: every iteration "
                    "has as many steps"
                )
            self.steps_per_iteration = steps // self.iterations
            # the first epoch would otherwise be the last one that loads its data
            self.trainer.reload_dataloaders_every_n_epochs = 1
            if self.reference == "initial":
                self.kept["initial"] = fitted_weights(self.policy)

    @property
    def scheduled_steps(self) -> int:
        return self.steps_per_iteration if self.restart_optimizer else super().scheduled_steps

    def owes_checkpoint(self, step: int) -> bool:
        # an iteration must begin from the same weights again to find its answers
        return step % self.steps_per_iteration == 0

    # An iteration

    def iterate(self, prompts: list[Prompt], identity: dict[str, Any], folder: Path) -> list[Pair]:
        """The pairs of the iteration that the trainer is in, sampled and labelled if that has not been done.

        Every process calls it and gets the same pairs. `identity` is what else decides about an answer, `folder` is
        where answers and labels are kept. Raises ValueError where no pair is left.
        """
        number, k = self.trainer.global_step // self.steps_per_iteration, self.rollouts["k"]
        self.oracle.to(self.device)
        self._meet_opponents(identity, folder)
        # numbers of its own: the same ones would let an iteration learn from the luck of the one before
        sampling = replace(self.behaviour, seed=self.behaviour.seed + SEEDS_APART * number)
        if number >= self.begun:
            self.sample(self._begin(number), prompts, k, sampling, identity, folder)
        cache = folder / cache_key(self.answered_by, prompts, k, sampling, identity)
        trajectories = load(cache)
        groups = [trajectories[i : i + k] for i in range(0, len(trajectories), k)]
        tables = self._tables(prompts, groups, folder)
        pairs = self._pairs(number, groups, tables, self.reference_log_probs(trajectories, cache))
        self._note(number, trajectories, pairs, len(prompts))
        self._clock = None
        return pairs

    def _begin(self, number: int) -> Policy:
        """Bring the policy to the weights that answer, note which these are, and return the policy that answers."""
        self._set_mode("eval")
        if number and self.restart_optimizer:
            self.trainer.strategy.setup_optimizers(self.trainer)
        self.advance(number)
        if self.reference == "ema":
            self._average()
        answering = self.sampler()
        self.begun, self.answered_by = number + 1, answering.fingerprint()
        self._set_mode("train")
        return answering

    def advance(self, number: int) -> None:
        """Change the policy between two fits; called once before iteration `number`, which counts from 0."""

    def sampler(self) -> Policy:
        """The policy that answers; every process calls it."""
        return self.policy

    def _average(self) -> None:
        now = fitted_weights(self.policy)
        before = self.kept.get("ema", now)
        self.kept["ema"] = {name: self.ema * before[name] + (1 - self.ema) * now[name] for name in now}

    def sample(
        self,
        policy: Policy,
        prompts: list[Prompt],
        k: int,
        sampling: Sampling,
        identity: dict[str, Any],
        folder: Path,
    ) -> None:
        """`k` answers of a policy to every prompt, of which those that are on disk are not sampled again."""
        together = {"rank": self.trainer.global_rank, "world": self.trainer.world_size}
        together |= {"barrier": self.trainer.strategy.barrier, "batch_rows": self.rollouts["batch_rows"]}
        rollout(policy, prompts, k, sampling, self.scorer, folder, identity=identity, **together)

    # Labels

    def _tables(
        self, prompts: list[Prompt], groups: list[list[Trajectory]], folder: Path
    ) -> list[Float[Tensor, "k k"]]:
        """For every prompt the preferences among its answers. Each process asks for its share, all read the whole."""
        labels, rank, world = labels_folder(folder, self.oracle), self.trainer.global_rank, self.trainer.world_size
        # an answer that was cut off is not judged
        ended = [[t.response for t in group if t.finished] for group in groups]
        Remembered(self.oracle, labels).tables(prompts[rank::world], ended[rank::world])
        self.trainer.strategy.barrier()
        tables = Remembered(self.oracle, labels).tables(prompts, ended)
        return [_among_all(table, group) for table, group in zip(tables, groups)]

    def _pairs(
        self,
        number: int,
        groups: list[list[Trajectory]],
        tables: list[Float[Tensor, "k k"]],
        lp_ref: list[list[float]],
    ) -> list[Pair]:
        generator = random.Random(f"{self.rollouts['seed']}/{number}")
        pairs = []
        for place, (group, table) in enumerate(zip(groups, tables)):
            table = labelling.aggregated(table) if self.winrate == "aggregated" else table
            value = labelling.mean_scores(table) if self.value == "score" else labelling.win_rates(table)
            for i, j in labelling.choose(table, [t.response for t in group], self.rule, generator):
                two, first = (group[i], group[j]), place * len(group)
                pair = Pair(
                    prompt_id=two[0].prompt_id,
                    prompt_ids=two[0].prompt_ids,
                    responses=(two[0].response_ids, two[1].response_ids),
                    label=float(table[i, j]) if self.label == "soft" else 1.0,
                    value=(float(value[i]), float(value[j])),
                    lp_ref=(lp_ref[first + i], lp_ref[first + j]),
                )
                pairs.append(pair)
        if not pairs:
            raise ValueError(
                f"iteration {number + 1}: the oracle prefers no answer to another one of the same prompt; raise "
                "rollouts.k, rollouts.temperature or data.max_response, or start from a better policy"
            )
        return pairs

    # The reference

    def reference_log_probs(self, trajectories: list[Trajectory], cache: Path) -> list[list[float]]:
        """Log-probabilities (nats) of the reference, a number per response token of every trajectory."""
        if self.reference == "previous":
            return [t.lp_ref for t in trajectories]
        return self.log_probs_of(self.reference, trajectories, cache)

    def log_probs_of(self, moment: str, trajectories: list[Trajectory], cache: Path) -> list[list[float]]:
        """Log-probabilities (nats) under the weights of another moment, kept in `cache`."""
        rows = [(t.prompt_ids, t.response_ids) for t in trajectories]
        policy = with_weights(self.policy, self.kept[moment])
        rank, barrier = self.trainer.global_rank, self.trainer.strategy.barrier
        compute = lambda: score_responses(policy, rows)  # noqa: E731
        return stored(cache, moment, [policy.fingerprint()], compute, rank, barrier)

    # What is measured

    def _note(self, number: int, trajectories: list[Trajectory], pairs: list[Pair], prompts: int) -> None:
        count = len(trajectories)
        self.sampled = {
            "iteration": number + 1.0,
            "sampled_length": sum(len(t.response_ids) for t in trajectories) / count,
            "sampled_finished": sum(t.finished for t in trajectories) / count,
            "pairs": float(len(pairs)),
        }
        rank_zero_info(f"iteration {number + 1}: {len(pairs)} pairs of {count} answers to {prompts} prompts")

    def report(self, compared: Compared, label: Float[Tensor, " pair"]) -> dict[str, Tensor]:
        """As of any loss of pairs, and what the answers of the iteration were like."""
        sampled = {name: compared.kl.new_tensor(value) for name, value in self.sampled.items()}
        return {**super().report(compared, label), **sampled}

    def _meet_opponents(self, identity: dict[str, Any], folder: Path) -> None:
        """What the policy that the run starts from says to the held-out prompts, which later policies must beat.

        Each answer as it was sampled, and the conversation that goes on from it to the end of the script.
        """
        if self.opponents:
            return
        data, k = self.trainer.datamodule, max(1, self.k)
        prompts = list({prompt.id: prompt for prompt in [*data.val, *data.test]}.values())
        # numbers of their own: an answer and its opponent are independent draws
        sampling = replace(self.sampling, seed=self.sampling.seed + 1)

        def answers(asked: list[Prompt], k: int) -> list[Trajectory]:
            if not self.trainer.global_step and not self.restored:
                self.sample(self.policy, asked, k, sampling, identity, folder)
            return load(folder / cache_key(self.started_from, asked, k, sampling, identity))

        def reply(asked: list[Prompt]) -> list[tuple[str, bool]]:
            return [(t.response, t.finished) for t in answers(asked, 1)]

        first, starts = answers(prompts, k), [prompt for prompt in prompts for _ in range(k)]
        lines = [begun(start, t.sample, t.response, t.finished) for start, t in zip(starts, first)]
        for trajectory, line in zip(first, to_the_end(lines, data, reply)):
            self.opponents.setdefault(trajectory.prompt_id, []).append((trajectory, line))
        self.judging = Remembered(self.oracle, labels_folder(folder, self.oracle))

    def begin_evaluation(self, k: int) -> None:
        super().begin_evaluation(k)
        data = self.trainer.datamodule
        self.oracle.to(self.device)
        self._meet_opponents(data.identity, data.cache)
        self.evaluation = GameEvaluation(self, self.evaluation, max(1, k))

    def judge(self, batch: PreferenceBatch) -> None:
        """Whether the implicit reward orders held-out pairs as their labels do; they have no win rates for a loss."""
        with torch.no_grad():
            compared = self.compare(batch)
            found = Preference.report(self, compared, batch["label"])
        self.evaluation.add(float(len(batch["label"])), pair_accuracy=found["rewards/accuracy"])

    # Going on

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {name: weights for name, weights in self.kept.items() if name != "initial"}
        state = {"begun": self.begun, "answered_by": self.answered_by, "started_from": self.started_from}
        checkpoint["iterative"] = {**state, "kept": kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored = True
        state = checkpoint["iterative"]
        self.begun, self.answered_by = state["begun"], state["answered_by"]
        self.started_from = state["started_from"]
        self.kept |= state["kept"]


def with_weights(policy: Policy, weights: dict[str, Tensor]) -> Policy:
    """A frozen copy of the policy with other weights in the place of those that are trained; every process calls it."""
    plain = unsharded(policy)
    made = copy.deepcopy(plain, {id(plain.tokenizer): plain.tokenizer}) if plain is policy else plain
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(placed(tensor, parameters[name]))
    made.is_frozen = True
    return made.requires_grad_(False).eval()


def _among_all(table: Float[Tensor, "ended ended"], group: list[Trajectory]) -> Float[Tensor, "k k"]:
    """The table with the answers that were cut off, which lose to those that ended."""
    ended = torch.tensor([t.finished for t in group])
    whole = torch.full((len(group), len(group)), 0.5)
    whole[torch.outer(ended, ended)] = table.flatten()
    return labelling.cut_off_loses(whole, ended[:, None].expand_as(whole), ended[None, :].expand_as(whole))
