"""Mathematical word problems with a checkable answer: GSM8K and MATH, real or generated."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from datamodules.answers import BoxedAnswer, NumberAnswer
from datamodules.batches import Pair, PreferenceBatch, Prompt, PromptBatch, TokenBatch, Trajectory, TrajectoryBatch
from datamodules.collation import trajectory_batch
from datamodules.loaders import prompt_loader
from datamodules.policy_data import PolicyData, say
from datamodules.problems import Problem, find, strip_annotations
from datamodules.process_reward import annotation_rewards
from datamodules.trajectories import Response, read_trajectories

PROCESS_REWARDS = ("none", "annotation", "mc")
PAIRS_PER_PROMPT = 6  # OREO, arXiv 2412.16145, appendix A


class MathProblems(PolicyData):
    """Problems, worked solutions, and the policy's own scored answers, as the method asks for them.

    The rows are read when the module is made, so that a bad file is refused before a model is loaded. `TokenBatch` is
    the worked solutions; `TrajectoryBatch` and `PreferenceBatch` are answers sampled by the policy that is trained,
    through its `rollout`, or read from the file `trajectories`; validation and test are `PromptBatch`es.
    """

    serves: ClassVar[tuple[type, ...]] = (TokenBatch, PromptBatch, TrajectoryBatch, PreferenceBatch)

    def __init__(
        self,
        name: str,
        path: str | None,
        download: bool,
        trajectories: str | None,
        limit: int | None,
        val_size: int,
        batch_size: int,
        packed: bool,
        pad_to_multiple: int,
        max_prompt: int,
        max_response: int,
        prompt: str,
        strip_annotations: bool,
        extract: str,
        process_reward: str,
        process_scale: float,
        standin: dict[str, Any],
        on_error: str,
        seed: int,
        workers: int,
        cache: str,
    ) -> None:
        super().__init__()
        if process_reward not in PROCESS_REWARDS:
            raise ValueError(f"data.process_reward={process_reward}: there are {', '.join(PROCESS_REWARDS)}")
        self.batch_size, self.packed, self.multiple = batch_size, packed, pad_to_multiple
        self.max_prompt, self.max_response = max_prompt, max_response
        self.template, self.strip, self.workers, self.seed = prompt, strip_annotations, workers, seed
        self.process_reward, self.process_scale = process_reward, process_scale
        self.cache = Path(cache)
        self.scorer = BoxedAnswer() if extract == "boxed" else NumberAnswer(extract)
        self.on_error = on_error
        self.source = find(name, path, download, val_size=val_size, seed=seed, standin=dict(standin), on_error=on_error)
        self.name, self.standin = self.source.name, self.source.standin
        self.parts = {part: rows[:limit] for part, rows in self.source.parts.items()}
        if not self.parts["test"]:
            say(f"{self.source.origin} has no test problems: the validation problems are tested")
            self.parts["test"] = self.parts["val"]
        self.responses, self.held_out_responses = self._offline(trajectories, limit)
        self.trajectories: list[Trajectory] = []
        self.pairs: list[Pair] = []
        self.held_out: list[Trajectory] = []

    @property
    def fingerprint(self) -> str:
        """What the rows are: digests of the files, or the generator's parameters."""
        return self.source.fingerprint

    def _offline(self, file: str | None, limit: int | None) -> tuple[list[Response], list[Response]]:
        """Scored solutions of a file, a fifth of the problems held out; the test loses problems that are learned."""
        if file is None:
            return [], []
        responses = read_trajectories(Path(file), self.scorer)
        problems = sorted({response.prompt_id for response in responses})
        random.Random(self.seed).shuffle(problems)
        problems = problems[:limit]
        held_out = set(problems[: max(1, len(problems) // 5)])
        learned = {r.question for r in responses if r.prompt_id in set(problems) - held_out}
        before = len(self.parts["test"])
        self.parts["test"] = [row for row in self.parts["test"] if row.question not in learned]
        if len(self.parts["test"]) < before:
            say(f"{before - len(self.parts['test'])} of {before} test problems are in {file}: they are not tested")
        chosen = [response for response in responses if response.prompt_id in set(problems)]
        return _split(chosen, lambda response: response.prompt_id in held_out)

    # From text to tokens

    def setup(self, stage: str) -> None:
        self.check_room(self.max_prompt, self.max_response)
        if stage == "fit":
            self.check_packing()
        self.val = self._prompts("val")
        self.test = self._prompts("test")
        self._index = {prompt.id: number for part in (self.val, self.test) for number, prompt in enumerate(part)}

    def index(self, prompt: Prompt) -> int:
        """The number of a problem in its part."""
        return self._index[prompt.id]

    def encode_prompt(self, question: str) -> list[int]:
        """Tokens of a problem: through the model's chat template when it has one, else the plain template."""
        return self.encode_turn(self.template.format(question=question))

    def _prompts(self, part: str) -> list[Prompt]:
        prompts = [Prompt(r.id, r.question, r.gold, self.encode_prompt(r.question)) for r in self.parts[part]]
        fitting, long = _split(prompts, lambda prompt: len(prompt.ids) > self.max_prompt)
        if long and part in ("val", "test") and self.on_error == "stop":
            raise ValueError(
                f"{self.source.origin}: the {part} problem {long[0].id} has {len(long[0].ids)} tokens, more than "
                f"data.max_prompt={self.max_prompt}: raise that, or leave such problems out with data.on_error=skip"
            )
        if long:
            say(f"{len(long)} of {len(prompts)} {part} problems exceed data.max_prompt={self.max_prompt}: left out")
        return fitting

    # Training

    def train_dataloader(self) -> DataLoader:
        views = {TokenBatch: self._solutions, TrajectoryBatch: self._answers, PreferenceBatch: self._pairs}
        return views[self.method.batch_type]()

    def _solutions(self) -> DataLoader:
        texts = [strip_annotations(r.solution) if self.strip else r.solution for r in self.parts["sft"]]
        rows = [
            (self.encode_prompt(row.question), self.encode_response(text))
            for row, text in zip(self.parts["sft"], texts)
        ]
        fitting, long = _split(rows, lambda row: len(row[0]) > self.max_prompt or len(row[1]) > self.max_response)
        if long:
            say(f"{len(long)} of {len(rows)} solutions exceed data.max_prompt or data.max_response: left out")
        return self.training(fitting, self.token_batch)

    def _answers(self) -> DataLoader:
        self.trajectories = self.method.keep(self._trajectories())
        rows = [(t.prompt_ids, t.response_ids, t) for t in self.trajectories]
        return self.training(
            rows, lambda chosen, share: trajectory_batch([row[2] for row in chosen], self.pad, share, self.multiple)
        )

    def _pairs(self) -> DataLoader:
        if self.method.labels:
            self.pairs = self.method.iterate(self._prompts("prompts"), self.identity, self.cache)
        else:
            self.trajectories = self.method.keep(self._trajectories())
            self.pairs = preference_pairs(self.trajectories, self.seed)
        rows = [(pair.prompt_ids, max(pair.responses, key=len), pair) for pair in self.pairs]
        return self.training(rows, lambda chosen, share: self.pair_batch([row[2] for row in chosen], share))

    def _trajectories(self) -> list[Trajectory]:
        if self.responses:
            trajectories = self._scored(self.responses)
        else:
            trajectories = self.method.rollout(self._prompts("prompts"), self.identity, self.cache)
        if self.method.imitates_solutions:
            trajectories = [*trajectories, *self._scored([self._given(problem) for problem in self.parts["prompts"]])]
        return self._with_step_rewards([t for t in trajectories if t.response_ids])

    @property
    def identity(self) -> dict[str, str]:
        """What decides about sampled answers beside prompts, policy and sampler."""
        return {"data": self.fingerprint, "scorer": self.scorer.version, "template": self.template}

    def _given(self, problem: Problem) -> Response:
        """The data's own solution as a right answer."""
        text = strip_annotations(problem.solution) if self.strip else problem.solution
        return Response(problem.id, -1, problem.question, text, problem.gold, 1.0)

    def _scored(self, responses: list[Response]) -> list[Trajectory]:
        """Trajectories of given solutions: the reference stands in for the behaviour policy, which nobody recorded."""
        encoded = [(self.encode_prompt(r.question), self.encode_response(r.response)) for r in responses]
        rows = [
            Trajectory(r.prompt_id, r.sample, r.question, r.gold or "", r.response, p, a, True, [], [], None, r.reward)
            for r, (p, a) in zip(responses, encoded)
        ]
        fitting, long = _split(
            rows, lambda t: len(t.prompt_ids) > self.max_prompt or len(t.response_ids) > self.max_response
        )
        if long:
            say(f"{len(long)} of {len(rows)} solutions exceed data.max_prompt or data.max_response: left out")
        return self.method.with_log_probs(fitting, self.cache)

    def _with_step_rewards(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        if self.process_reward == "annotation":
            decode = self.tokenizer.decode
            rewards = [annotation_rewards(t.response_ids, decode, self.process_scale) for t in trajectories]
        elif self.process_reward == "mc":
            rewards = self.method.monte_carlo_rewards(trajectories, self.cache)
        else:
            return trajectories
        return [replace(t, step_rewards=steps) for t, steps in zip(trajectories, rewards)]

    # Evaluation

    def val_dataloader(self) -> list[DataLoader]:
        return [prompt_loader(self.val, self.trainer), *self._held_out()]

    def test_dataloader(self) -> list[DataLoader]:
        return [prompt_loader(self.test, self.trainer), *self._held_out()]

    def predict_dataloader(self) -> DataLoader:
        return prompt_loader(self.test, self.trainer)

    def _held_out(self) -> list[DataLoader]:
        """Scored solutions of held-out problems, all of them on every process: their networks may be sharded."""
        if not self.held_out_responses or not self.method.judges:
            return []
        self.held_out = self.held_out or self._scored(self.held_out_responses)
        cut = [self.held_out[i : i + 16] for i in range(0, len(self.held_out), 16)]
        return [DataLoader([trajectory_batch(part, self.pad, 1.0) for part in cut], batch_size=None)]


def preference_pairs(trajectories: Sequence[Trajectory], seed: int) -> list[Pair]:
    """(correct, incorrect) pairs of one problem without replacement, six at most (arXiv 2412.16145, appendix A)."""
    by_prompt: dict[str, tuple[list[Trajectory], list[Trajectory]]] = {}
    for trajectory in trajectories:
        by_prompt.setdefault(trajectory.prompt_id, ([], []))[trajectory.reward <= 0].append(trajectory)
    generator = random.Random(seed)
    pairs = []
    for right, wrong in by_prompt.values():
        count = min(len(right), len(wrong), PAIRS_PER_PROMPT)
        pairs += map(_pair, generator.sample(right, count), generator.sample(wrong, count))
    return pairs


def _pair(right: Trajectory, wrong: Trajectory) -> Pair:
    responses, lp_ref = (right.response_ids, wrong.response_ids), (right.lp_ref, wrong.lp_ref)
    return Pair(right.prompt_id, right.prompt_ids, responses, lp_ref=lp_ref)


def _split(rows: Sequence[Any], apart: Callable[[Any], bool]) -> tuple[list[Any], list[Any]]:
    return [row for row in rows if not apart(row)], [row for row in rows if apart(row)]
