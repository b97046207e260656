"""Scored answers to a set of prompts, sampled once and kept on disk.

A finished cache is `folder/<key>/` with `trajectories.jsonl`, one response a line, and `manifest.json`, written last.
The key is a hash of everything that decides what the file contains: weights, prompts, sampler and the caller's
`identity` (scorer, template). Until then every rank appends whole batches to its own part file, so that a killed run
continues where it stopped, on any number of processes.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from datamodules.batches import Prompt, Trajectory
from lightning_modules.alignment.generation import Sample, Sampling, batches, generate
from lightning_modules.alignment.policy import AdapterOff, Policy, unsharded

DATA, MANIFEST = "trajectories.jsonl", "manifest.json"
TOKENS_AT_ONCE = 2**14  # in one teacher-forced forward

log = logging.getLogger(__name__)


class Score(Protocol):
    """A verdict on one response."""

    extracted: str | None
    correct: bool


Scorer = Callable[[str, str], Score]
"""`score(response, gold)`."""


def rollout(
    policy: Policy,
    prompts: list[Prompt],
    k: int,
    sampling: Sampling,
    score: Scorer | None,
    folder: str | Path,
    *,
    identity: dict[str, Any],
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], Any] | None = None,
    reference: Policy | AdapterOff | None = None,
    batch_rows: int = 512,
) -> list[Trajectory]:
    """`k` scored responses to each prompt, in the order of the prompts; from the cache when it is there.

    Every rank calls it (`barrier` is needed when `world` > 1) and gets all trajectories; `folder` is shared by the
    ranks. `identity` names what else the result depends on: scorer version, template, tokenizer. Without `score` all
    rewards are 0. `reference` is the policy itself when None. `batch_rows` bounds the responses sampled at once; a
    batch is also what an interruption can lose. Raises ValueError when a finished cache does not match its checksum.
    """
    if world > 1 and barrier is None:
        raise ValueError(f"rollout on {world} processes needs a barrier.")
    _check_prompts(prompts)
    wait = barrier or (lambda: None)
    policy, reference = unsharded(policy), None if reference is None else unsharded(reference)
    judged_by = None if reference is None else reference.fingerprint()
    inputs = _inputs(policy.fingerprint(), judged_by, prompts, k, sampling, identity)
    cache = Path(folder) / _key(inputs)
    with _alone(cache) if rank == 0 else nullcontext():
        wait()
        complete = (cache / MANIFEST).exists()
        wait()  # nobody may complete the cache before everybody has looked
        if not complete:
            _sample_missing(policy, reference, prompts, k, sampling, score, cache, rank, world, batch_rows)
            wait()
            if rank == 0:
                _merge(cache, prompts, k, inputs, scored=score is not None)
            wait()
        return load(cache)


def cache_key(weights: str, prompts: list[Prompt], k: int, sampling: Sampling, identity: dict[str, Any]) -> str:
    """The folder name under which `rollout` keeps what a policy with that fingerprint sampled."""
    return _key(_inputs(weights, None, prompts, k, sampling, identity))


def load(cache: Path) -> list[Trajectory]:
    """The trajectories of a finished cache. Raises ValueError when the file is not the one that was written."""
    if not (cache / MANIFEST).exists():
        raise FileNotFoundError(f"{cache} holds no finished rollouts, and this run learns from them: resume=never")
    expected = json.loads((cache / MANIFEST).read_text())["sha256"]
    data = (cache / DATA).read_bytes() if (cache / DATA).exists() else b""
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(
            f"{cache / DATA} does not match the checksum in {MANIFEST}: it was changed or damaged after it was "
            f"written; delete the folder {cache} to sample again."
        )
    return [Trajectory(**json.loads(line)) for line in data.decode().split("\n")[:-1]]


def monte_carlo_rewards(
    policy: Policy,
    trajectories: list[Trajectory],
    k: int,
    sampling: Sampling,
    score: Scorer,
    end_of_step: str = "\n",
    batch_rows: int = 512,
) -> list[list[float]]:
    """Step rewards of each trajectory, one number per response token (arXiv 2410.09302, section 4.4, our recipe).

    The potential Phi of a state is the fraction of `k` continuations that are right. On the last token of each step
    (a token that contains `end_of_step`, and the last of the response) stands the difference of Phi between the ends
    of this step and of the one before. Phi is zero after the last token, so that added to the outcome reward this is
    potential-based shaping: the sum over a response is minus Phi of its prompt, whatever the response.
    """
    policy = unsharded(policy)
    ends = [_step_ends(policy, trajectory, end_of_step) for trajectory in trajectories]
    states = [(row, length) for row, steps in enumerate(ends) for length in [0, *steps[:-1]]]
    prefixes = [trajectories[row].prompt_ids + trajectories[row].response_ids[:length] for row, length in states]
    keys = [f"{trajectories[row].prompt_id}/{trajectories[row].sample}/{length}" for row, length in states]
    potential = {}
    for position, samples in generate(policy, prefixes, k, sampling, keys, batch_rows):
        row, length = states[position]
        start, gold = trajectories[row].response_ids[:length], trajectories[row].gold
        right = [sample.finished and score(_text(policy, start + sample.ids), gold).correct for sample in samples]
        potential[row, length] = sum(right) / k
    return [
        _differences([potential[row, length] for length in [0, *steps[:-1]]], steps) for row, steps in enumerate(ends)
    ]


def _step_ends(policy: Policy, trajectory: Trajectory, end_of_step: str) -> list[int]:
    """Response lengths at which a step ends."""
    texts = policy.tokenizer.batch_decode([[token] for token in trajectory.response_ids])
    ends = [index + 1 for index, text in enumerate(texts) if end_of_step in text]
    return sorted({*ends, len(texts)})


def _differences(potentials: list[float], ends: list[int]) -> list[float]:
    rewards = [0.0] * ends[-1]
    for end, before, after in zip(ends, potentials, [*potentials[1:], 0.0]):
        rewards[end - 1] = after - before
    return rewards


def _check_prompts(prompts: list[Prompt]) -> None:
    seen = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"Two prompts have the id {prompt.id!r}: their responses could not be told apart.")
        seen.add(prompt.id)


def _inputs(
    weights: str,
    reference_weights: str | None,
    prompts: list[Prompt],
    k: int,
    sampling: Sampling,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """All that decides the content of the cache."""
    rows = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    return {
        "policy": weights,
        "reference": reference_weights,
        "prompts": hashlib.sha256(rows.encode()).hexdigest(),
        "k": k,
        "sampling": asdict(sampling),
        "identity": identity,
    }


def _key(inputs: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=12).hexdigest()


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Wait for other runs that fill the same cache; the system releases the lock of a killed one."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sample_missing(
    policy: Policy,
    reference: Policy | AdapterOff | None,
    prompts: list[Prompt],
    k: int,
    sampling: Sampling,
    score: Scorer | None,
    cache: Path,
    rank: int,
    world: int,
    batch_rows: int,
) -> None:
    """Append this rank's share of the missing batches to its part file.

    The batches are those of an uninterrupted single process, because their composition shows in the last bit of a
    log-probability.
    """
    done = _parts(cache).keys()
    groups = batches([len(prompt.ids) for prompt in prompts], k, batch_rows)
    groups = [[prompts[position] for position in group if prompts[position].id not in done] for group in groups]
    mine = [group for group in groups if group][rank::world]
    with _append(cache / f"part-{rank}.jsonl") as part, _progress(sum(map(len, mine)), rank) as advance:
        for group in mine:
            records = _records(policy, reference, group, k, sampling, score)
            # one line per batch: after a kill it is there or it is not
            part.write(json.dumps(records) + "\n")
            part.flush()
            advance(len(group))


def _parts(cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Finished records by prompt id, from the part files of every rank there ever was."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(cache.glob("part-*.jsonl")):
        for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
            for record in _parse(line, path, number):
                found.setdefault(record["prompt_id"], []).append(record)
    return found


def _parse(line: str, path: Path, number: int) -> list[dict[str, Any]]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is damaged ({error}); delete that file to sample it again.") from error


@contextmanager
def _append(path: Path) -> Iterator[Any]:
    """The part file, without the half line that a kill may have left."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    with open(path, "a") as file:
        yield file


def _records(
    policy: Policy,
    reference: Policy | AdapterOff | None,
    group: list[Prompt],
    k: int,
    sampling: Sampling,
    score: Scorer | None,
) -> list[dict[str, Any]]:
    """`k` responses to each prompt of the group, scored, as JSON-ready trajectories."""
    ids, keys = [prompt.ids for prompt in group], [prompt.id for prompt in group]
    answers = dict(generate(policy, ids, k, sampling, keys, batch_rows=len(group) * k))
    rows = [(group[position], index, answers[position][index]) for position in range(len(group)) for index in range(k)]
    pairs = [(prompt.ids, sample.ids) for prompt, _, sample in rows]
    # the forward of the training, not the sampler's: ratios are then exactly one where nothing has changed
    own = score_responses(policy, pairs) if sampling.is_plain or reference is None else None
    ref = own if reference is None else score_responses(reference, pairs)
    mu = own if sampling.is_plain else [sample.log_probs for _, _, sample in rows]
    return [_record(policy, *row, lp_mu, lp_ref, score) for row, lp_mu, lp_ref in zip(rows, mu, ref)]


def _record(
    policy: Policy,
    prompt: Prompt,
    index: int,
    sample: Sample,
    lp_mu: list[float],
    lp_ref: list[float],
    score: Scorer | None,
) -> dict[str, Any]:
    response = _text(policy, sample.ids)
    verdict = score(response, prompt.gold) if score else None
    trajectory = Trajectory(
        prompt_id=prompt.id,
        sample=index,
        question=prompt.question,
        gold=prompt.gold,
        response=response,
        prompt_ids=prompt.ids,
        response_ids=sample.ids,
        finished=sample.finished,
        lp_mu=_short(lp_mu),
        lp_ref=_short(lp_ref),
        extracted=verdict.extracted if verdict else None,
        # a response that was cut off is a failure, whatever stands in it
        reward=float(sample.finished and verdict is not None and verdict.correct),
    )
    return asdict(trajectory)


def _text(policy: Policy, ids: list[int]) -> str:
    """The response as it is scored: without its end token."""
    ids = ids[:-1] if ids and ids[-1] in policy.stop_ids else ids
    return policy.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _short(values: list[float]) -> list[float]:
    # nine significant digits bring a float32 back exactly
    return [float(f"{value:.9g}") for value in values]


def stored(
    folder: Path, name: str, inputs: Any, compute: Callable[[], list[list[float]]] | None, rank: int, barrier: Callable
) -> list[list[float]]:
    """Numbers per response token that depend on `inputs` only: computed once and kept under `folder`.

    Every rank calls it, since `compute` may be collective. Where `compute` is None they must be there: raises
    FileNotFoundError when they are not.
    """
    path = folder / f"{name}-{hashlib.blake2b(json.dumps(inputs).encode(), digest_size=12).hexdigest()}.json"
    there = path.exists()
    barrier()  # nobody may write before everybody has looked
    if not there and compute is None:
        raise FileNotFoundError(f"{path} is gone, and this run learns with it: start anew with resume=never")
    if not there:
        values = [_short(row) for row in compute()]
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(path, json.dumps(values).encode())
    barrier()
    return json.loads(path.read_text())


@torch.no_grad()
def score_responses(policy: Policy | AdapterOff, pairs: list[tuple[list[int], list[int]]]) -> list[list[float]]:
    """Log-probabilities (nats, float32) of the response in each (prompt, response), by the forward of the training."""
    order = sorted(range(len(pairs)), key=lambda row: sum(map(len, pairs[row])))
    longest = sum(map(len, pairs[order[-1]]))
    size = max(1, TOKENS_AT_ONCE // longest)
    result: list[list[float]] = [[] for _ in pairs]
    for rows in (order[start : start + size] for start in range(0, len(order), size)):
        ids, mask = padded([pairs[row] for row in rows], policy)
        log_probs = policy(ids, mask).log_probs.cpu()
        for row, values in zip(rows, log_probs):
            prompt, response = pairs[row]
            result[row] = values[len(prompt) - 1 : len(prompt) - 1 + len(response)].tolist()
    return result


def padded(pairs: list[tuple[list[int], list[int]]], policy: Policy | AdapterOff) -> tuple[Tensor, Tensor]:
    """Right-padded ids (batch, length) and the mask (batch, length - 1) of the predicted response tokens."""
    length = max(sum(map(len, pair)) for pair in pairs)
    ids = torch.full((len(pairs), length), policy.tokenizer.pad_token_id)
    mask = torch.zeros(len(pairs), length - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return ids.to(policy.device), mask.to(policy.device)


def _merge(cache: Path, prompts: list[Prompt], k: int, inputs: dict[str, Any], scored: bool) -> None:
    """Write data and manifest from the part files, then remove these."""
    found = _parts(cache)
    missing = [prompt.id for prompt in prompts if prompt.id not in found]
    if missing:
        raise RuntimeError(
            f"{len(missing)} prompts have no responses in {cache}, {missing[0]!r} for one: the folder of the rollouts "
            "must be shared by all processes."
        )
    records = [record for prompt in prompts for record in found[prompt.id][:k]]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    _replace(cache / DATA, data)
    summary = _summary(np.array([record["reward"] for record in records]).reshape(-1, k), records)
    if scored:
        _warn(summary, cache)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions["transformers"] = transformers.__version__
    manifest = {**inputs, **summary, "versions": versions, "sha256": hashlib.sha256(data).hexdigest()}
    _replace(cache / MANIFEST, json.dumps(manifest, indent=2).encode())
    for path in cache.glob("part-*.jsonl"):
        path.unlink()


def _summary(rewards: np.ndarray, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and fractions; `rewards` is (prompt, sample)."""
    return {
        "prompts": len(rewards),
        "responses": len(records),
        "response_tokens": sum(len(record["response_ids"]) for record in records),
        "mean_reward": float(rewards.mean()),
        "format_rate": float(np.mean([record["extracted"] is not None for record in records])),
        "finished": float(np.mean([record["finished"] for record in records])),
        "all_right": float((rewards == 1).all(1).mean()),
        "all_wrong": float((rewards == 0).all(1).mean()),
    }


def _warn(summary: dict[str, Any], cache: Path) -> None:
    reward, formatted = summary["mean_reward"], summary["format_rate"]
    if not 0.01 <= reward <= 0.99:
        log.warning(
            "Mean reward %.2f %% in %s: hardly anything to learn from; read some responses.", 100 * reward, cache
        )
    if formatted < 0.5:
        log.warning("Only %.1f %% of the responses in %s have the answer format.", 100 * formatted, cache)


def _replace(path: Path, data: bytes) -> None:
    """Complete or absent, also after a power cut and where another run writes the same."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def _progress(total: int, rank: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line each tenth elsewhere, nothing on other ranks."""
    console = Console(stderr=True)
    if rank or not total:
        yield lambda count: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("rollout (prompts)", total=total)
            yield lambda count: bar.advance(task, count)
    else:
        yield _plain_progress(total, console)


def _plain_progress(total: int, console: Console) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if 10 * before // total < 10 * done // total:
            console.print(f"rollout: {done} of {total} prompts", highlight=False)

    return advance
