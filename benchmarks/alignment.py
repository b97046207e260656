"""What a DPO step costs here, in TRL and in a bare PyTorch loop: `python benchmarks/alignment.py [--prompt 64]`.

All sides train one network on the same pairs with AdamW in one process, their steps interleaved: each runs in a thread
of its own and has one step, from the loading of its batch to the end of the optimizer's step, before the next one's
turn comes. The losses are compared first. Ours runs through Lightning's trainer as `train.py` runs it, logging every
tenth step, TRL through its `DPOTrainer`; the bare loop computes the reference's log-probabilities in the step. Medians
over the steps, ratios to the bare loop with their 10th and 90th percentile. TRL is in the extra `bench`; without it the
other sides run.
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

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from datamodules.batches import Pair
from datamodules.collation import preference_batch
from datamodules.pair_packing import packed_preference_batch
from lightning_modules.alignment import pairwise, policies
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.preference import Preference
from lightning_modules.alignment.rollout import score_responses
from lightning_modules.optimizers.schedules import warmup_constant

BETA, LR = 0.1, 1e-4
BARE, TRL = "bare loop", "TRL"  # both with the reference in the step
WARM = slice(3, None)  # the steps that count
SIZES = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "hidden": 512},
    "small": {"width": 320, "layers": 8, "heads": 5, "hidden": 1280},
}


class Turns:
    """Sides that work one after the other, a step each; what they measure in their turn is theirs alone."""

    def __init__(self, sides: list[str]) -> None:
        self.sides, self.changed, self.now = sides, threading.Condition(), 0
        self.seconds: dict[str, list[float]] = {side: [] for side in sides}
        self.losses: dict[str, list[float]] = {side: [] for side in sides}
        self._began = 0.0

    def take(self, side: str) -> None:
        """Wait for this side's turn and start its clock."""
        with self.changed:
            self.changed.wait_for(lambda: self.sides[self.now] == side)
        self._began = time.perf_counter()

    def give(self, side: str, loss: float) -> None:
        """End the turn."""
        self.seconds[side].append(time.perf_counter() - self._began)
        self.losses[side].append(loss)
        with self.changed:
            self.now = (self.now + 1) % len(self.sides)
            self.changed.notify_all()

    def leave(self, side: str) -> None:
        """The side has no step left, or failed."""
        with self.changed:
            place = self.sides.index(side)
            self.sides.remove(side)
            self.now = (self.now - (place < self.now)) % max(1, len(self.sides))
            self.changed.notify_all()


class Pairs(Dataset):
    """Batches of consecutive pairs, collated when they are asked for."""

    def __init__(self, pairs: list[Pair], size: int, cook: Callable) -> None:
        self.pairs, self.size, self.cook = pairs, size, cook

    def __len__(self) -> int:
        return len(self.pairs) // self.size

    def __getitem__(self, number: int) -> dict:
        return self.cook(self.pairs[number * self.size : (number + 1) * self.size], pad=0, token_share=1.0, multiple=1)


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
    model, reference = policy.model.train(), copy.deepcopy(policy.model).eval()
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
            before = sums(reference)
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


def race(options: argparse.Namespace) -> Turns:
    """All sides, from the same weights, until all have done their steps."""
    source = policies.tiny(context=4 * options.length, **SIZES[options.model])
    pairs = made_pairs(options, source)
    contestants = {BARE: bare, "ours, cached": ours, "ours, cached and packed": ours}
    if importlib.util.find_spec("trl"):
        contestants |= {TRL: trl, "TRL, cached": trl}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    turns = race(options)
    print(f"{options.model}, {options.pairs} pairs of {options.length} tokens", end=" ")
    print(f"({'ragged' if options.ragged else 'equal'}), prompts of {options.prompt}")
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s), {options.steps} steps")
    for side in turns.seconds:
        apart = max(abs(a - b) for a, b in zip(turns.losses[side], turns.losses[BARE]))
        median = statistics.median(turns.seconds[side][WARM])
        ratios = [f"{ratio(turns, side, other)} x {other}" for other in (BARE, TRL) if other in turns.seconds]
        print(f"{side:>26}: {1e3 * median:8.2f} ms, {', '.join(ratios)}, losses within {apart:.1e}")


def ratio(turns: Turns, side: str, other: str) -> str:
    """Median of the ratios of seconds, step by step, with their 10th and 90th percentile."""
    ratios = sorted(a / b for a, b in zip(turns.seconds[side][WARM], turns.seconds[other][WARM]))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
