"""What a DPO step costs here, in TRL and in a bare PyTorch loop: `python benchmarks/alignment.py [--table]`.

All sides train one network on the same pairs with AdamW in one process, their steps interleaved: each runs in a thread
of its own and has one step, from the loading of its batch to the end of the optimizer's step, before the next one's
turn comes; every round has an order of its own. The losses are compared first. Ours runs through Lightning's trainer as
`train.py` runs it, logging every tenth step, TRL through its `DPOTrainer`. "cached" sides are given the reference's
log-probabilities, the others compute them in the step; ours are always given.

Two clocks: the wall's, and the processor time of the whole process, which other programs on the machine hardly change
(only one side works at a time, and with one thread backward passes run in the side's own). Medians over the steps, and
of the ratios of steps of one round with their 10th and 90th percentile. TRL is in the extra `bench`; without it the
other sides run. `--table` measures every row of the table in benchmarks/results/alignment.md.
"""

import argparse
import copy
import functools
import importlib.util
import logging
import platform
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel

from datamodules.batches import Pair
from datamodules.collation import preference_batch
from datamodules.pair_packing import packed_preference_batch
from lightning_modules.alignment import pairwise, policies
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.preference import Preference
from lightning_modules.alignment.rollout import score_responses
from lightning_modules.alignment.tiny_tokenizer import tiny_tokenizer
from lightning_modules.optimizers.schedules import warmup_constant

BETA, LR = 0.1, 1e-4
BARE, BARE_CACHED, TRL, TRL_CACHED = "bare loop", "bare loop, cached", "TRL", "TRL, cached"
OURS, PACKED = "ours, cached", "ours, cached and packed"
WARM = slice(3, None)  # the steps that count
SIZES = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "hidden": 512},
    "small": {"width": 320, "layers": 8, "heads": 5, "hidden": 1280},
}
# (architecture, size, ragged, steps): the rows of the table, each with one thread and with two
ROWS = (
    ("llama", "tiny", False, 20),
    ("gpt2", "tiny", False, 20),
    ("llama", "tiny", True, 20),
    ("llama", "small", False, 11),
    ("llama", "small", True, 11),
)
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


class Turns:
    """Sides that work one after the other, a step each a round; what they measure in their turn is theirs alone."""

    def __init__(self, sides: list[str]) -> None:
        self.sides, self.changed, self.generator = sides, threading.Condition(), random.Random(0)
        self.round: list[str] = []
        self.seconds: dict[str, dict[str, list[float]]] = {clock: {side: [] for side in sides} for clock in CLOCKS}
        self.losses: dict[str, list[float]] = {side: [] for side in sides}
        self._began: dict[str, float] = {}
        with self.changed:
            self._next()

    def take(self, side: str) -> None:
        """Wait for this side's turn and start its clocks."""
        with self.changed:
            self.changed.wait_for(lambda: self.round[0] == side)
        self._began = {clock: now() for clock, now in CLOCKS.items()}

    def give(self, side: str, loss: float) -> None:
        """End the turn."""
        for clock, now in CLOCKS.items():
            self.seconds[clock][side].append(now() - self._began[clock])
        self.losses[side].append(loss)
        with self.changed:
            self.round.remove(side)
            self._next()

    def leave(self, side: str) -> None:
        """The side has no step left, or failed."""
        with self.changed:
            self.sides.remove(side)
            self.round = [other for other in self.round if other != side]
            self._next()

    def _next(self) -> None:
        self.round = self.round or self.generator.sample(self.sides, len(self.sides))
        self.changed.notify_all()

    def ratio(self, clock: str, side: str, other: str) -> tuple[float, float, float]:
        """Median of the ratios of seconds, round by round, with their 10th and 90th percentile."""
        seconds = self.seconds[clock]
        ratios = sorted(a / b for a, b in zip(seconds[side][WARM], seconds[other][WARM]))
        return statistics.median(ratios), ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]

    def apart(self, side: str) -> float:
        """The largest difference of a loss from the bare loop's."""
        return max(abs(a - b) for a, b in zip(self.losses[side], self.losses[BARE]))


class Pairs(Dataset):
    """Batches of consecutive pairs, collated when they are asked for."""

    def __init__(self, pairs: list[Pair], size: int, cook: Callable) -> None:
        self.pairs, self.size, self.cook = pairs, size, cook

    def __len__(self) -> int:
        return len(self.pairs) // self.size

    def __getitem__(self, number: int) -> dict:
        return self.cook(self.pairs[number * self.size : (number + 1) * self.size], pad=0, token_share=1.0, multiple=1)


def made_policy(options: argparse.Namespace) -> Policy:
    """Random weights; transformers' Llama or GPT-2."""
    size, context = SIZES[options.model], 4 * options.length
    if options.architecture == "llama":
        return policies.tiny(context=context, **size)
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=context, n_embd=size["width"], n_layer=size["layers"],
        n_head=size["heads"], n_inner=size["hidden"], bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Policy(GPT2LMHeadModel(config), tokenizer)


def made_pairs(options: argparse.Namespace, policy: Policy) -> list[Pair]:
    """Random tokens with the reference's log-probabilities; the longest sequences have `length` tokens."""
    generator = random.Random(0)
    draw = lambda n: [generator.randrange(2, len(policy.tokenizer)) for _ in range(n)]  # noqa: E731
    answer = options.length - options.prompt
    size = lambda: generator.randint(answer // 4, answer) if options.ragged else answer  # noqa: E731
    count = options.pairs * (options.steps + 1)
    pairs = [Pair(str(i), draw(options.prompt), (draw(size()), draw(size()))) for i in range(count)]
    rows = [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
    values = score_responses(policy, rows)
    return [Pair(p.prompt_id, p.prompt_ids, p.responses, 1.0, None, (values[2 * i], values[2 * i + 1]))
            for i, p in enumerate(pairs)]  # fmt: skip


class Measured(L.Callback):
    """Lightning's steps as turns."""

    def __init__(self, turns: Turns, side: str) -> None:
        self.turns, self.side = turns, side

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx) -> None:
        self.turns.give(self.side, outputs["loss"].item())
        self.turns.take(self.side)


def ours(turns: Turns, side: str, policy: Policy, pairs: list[Pair], options: argparse.Namespace) -> None:
    """The method as `train.py` runs it."""
    packed = functools.partial(packed_preference_batch, room=options.room)
    with tempfile.TemporaryDirectory() as folder:
        method = Preference(
            functools.partial(pairwise.dpo, beta=BETA), policy=policy,
            optimizer=functools.partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
            scheduler=functools.partial(warmup_constant, warmup=0),
            evaluation={"k": 1, "max_new": 1, "batch_rows": 1},
        )  # fmt: skip
        method.train()
        trainer = L.Trainer(
            accelerator="cpu", max_steps=options.steps, logger=CSVLogger(folder), log_every_n_steps=10,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
            limit_val_batches=0, callbacks=[Measured(turns, side)], use_distributed_sampler=False,
        )  # fmt: skip
        batches = Pairs(pairs, options.pairs, packed if "packed" in side else preference_batch)
        trainer.fit(method, DataLoader(batches, batch_size=None))


def bare(turns: Turns, side: str, policy: Policy, pairs: list[Pair], options: argparse.Namespace) -> None:
    """A loop over transformers' model, as one would write it."""
    model, reference = policy.model.train(), None if "cached" in side else copy.deepcopy(policy.model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    batches = Pairs(pairs, options.pairs, preference_batch)
    for step in range(options.steps):
        batch = batches[step]
        ids, mask = batch["ids"].flatten(0, 1), batch["mask"].flatten(0, 1)

        def sums(network, ids=ids, mask=mask) -> torch.Tensor:
            logits = network(ids, use_cache=False).logits[:, :-1].float()
            said = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            return said.masked_fill(~mask, 0.0).sum(1)

        with torch.no_grad():
            before = sums(reference) if reference else batch["lp_ref"].flatten(0, 1).sum(1)
        log_ratio = sums(model) - before
        loss = -torch.nn.functional.logsigmoid(BETA * (log_ratio[0::2] - log_ratio[1::2])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        turns.give(side, loss.item())
        turns.take(side)


def trl(turns: Turns, side: str, policy: Policy, pairs: list[Pair], options: argparse.Namespace) -> None:
    """TRL's `DPOTrainer` on the tokens as they are, in their order."""
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_options):
            return dataset

        def _get_train_sampler(self, *_args):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **options):
            loss = super().training_step(*args, **options)
            self.last_loss = loss
            return loss

    class Measured(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            turns.give(side, trainer.last_loss.item())
            turns.take(side)

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": "", "prompt_ids": p.prompt_ids, "chosen_ids": p.responses[0], "rejected_ids": p.responses[1]}
                for p in pairs[: options.pairs * options.steps]]  # fmt: skip
        config = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, report_to=[],
            per_device_train_batch_size=options.pairs, max_steps=options.steps, learning_rate=LR, weight_decay=0.0,
            lr_scheduler_type="constant", beta=BETA, logging_steps=10, save_strategy="no", disable_tqdm=True,
            precompute_ref_log_probs="cached" in side, max_grad_norm=1.0, seed=0,
        )  # fmt: skip
        trainer = InOrder(
            policy.model, ref_model=copy.deepcopy(policy.model), args=config,
            train_dataset=datasets.Dataset.from_list(rows), processing_class=policy.tokenizer, callbacks=[Measured()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def race(options: argparse.Namespace, given: bool = True) -> Turns:
    """All sides, from the same weights, until all have done their steps; `given`: the others' cached ones as well."""
    source = made_policy(options)
    pairs = made_pairs(options, source)
    contestants = {BARE: bare, OURS: ours, PACKED: ours}
    contestants |= {TRL: trl} if importlib.util.find_spec("trl") else {}
    if given:
        contestants |= {BARE_CACHED: bare} | ({TRL_CACHED: trl} if TRL in contestants else {})
    turns, failures = Turns(list(contestants)), []

    def run(side: str, contestant: Callable) -> None:
        turns.take(side)  # what a side prepares is part of its first turn, which is not counted
        try:
            policy = copy.deepcopy(source, {id(source.tokenizer): source.tokenizer})
            contestant(turns, side, policy, pairs, options)
        except BaseException as error:
            failures.append(error)
        finally:
            turns.leave(side)

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in contestants.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return turns


def show(turns: Turns, options: argparse.Namespace) -> None:
    """Every side of one race."""
    print(f"{options.architecture} {options.model}, {options.pairs} pairs of {options.length} tokens", end=" ")
    print(f"({'ragged' if options.ragged else 'equal'}), prompts of {options.prompt}, {options.steps} steps")
    for clock, seconds in turns.seconds.items():
        for side, column in seconds.items():
            ratios = [f"{written(turns, clock, side, other)} x {other}" for other in (BARE, TRL) if other in seconds]
            median = 1e3 * statistics.median(column[WARM])
            print(f"{clock:>10} {side:>24}: {median:8.2f} ms, {', '.join(ratios)}, loss within {turns.apart(side):.1e}")


def written(turns: Turns, clock: str, side: str, other: str) -> str:
    """A ratio with its spread."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*turns.ratio(clock, side, other))


COLUMNS = {
    "ours / bare": (OURS, BARE),
    "ours / TRL": (OURS, TRL),
    "packed / bare": (PACKED, BARE),
    "packed / TRL": (PACKED, TRL),
    "ours / bare cached": (OURS, BARE_CACHED),
    "ours / TRL cached": (OURS, TRL_CACHED),
    "packed / TRL cached": (PACKED, TRL_CACHED),
    "TRL / bare": (TRL, BARE),
}


def table(options: argparse.Namespace) -> None:
    """Every row with both clocks, as markdown; `COLUMNS` without TRL's where it is not installed."""
    print(f"| network | responses | threads | clock | bare, ms | {' | '.join(COLUMNS)} | losses within |")
    print("|" + "---|" * (len(COLUMNS) + 6))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for architecture, model, ragged, steps in ROWS:
            case = {"architecture": architecture, "model": model, "ragged": ragged, "steps": steps}
            # a small network's sides that are given the reference say nothing that a tiny one's do not
            turns = race(argparse.Namespace(**{**vars(options), **case}), given=model == "tiny")
            name = f"{architecture} {model} | {'ragged' if ragged else 'equal'} | {threads}"
            apart = max(map(turns.apart, turns.losses))
            for clock, seconds in turns.seconds.items():
                cells = [written(turns, clock, *two) if set(two) <= set(seconds) else "" for two in COLUMNS.values()]
                median = 1e3 * statistics.median(seconds[BARE][WARM])
                print(f"| {name} | {clock} | {median:.0f} | {' | '.join(cells)} | {apart:.0e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="all rows; its own architecture, model, steps, threads")
    parser.add_argument("--architecture", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--model", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt with its response")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--ragged", action="store_true", help="responses of a quarter of their length to all of it")
    parser.add_argument("--room", type=int, default=256, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    packages = ["torch", "transformers", "lightning", *(["trl"] if importlib.util.find_spec("trl") else [])]
    print(", ".join(f"{name} {version(name)}" for name in packages), platform.machine(), flush=True)
    if options.table:
        return table(options)
    show(race(options), options)


if __name__ == "__main__":
    main()
