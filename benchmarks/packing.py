"""What packed rows save beside padded ones: `TESSERA_DATA=<data> python benchmarks/packing.py`.

Both sides train the tiny policy by SFT on the same batches of real GSM8K solutions (generated ones where there are
none), dealt out as the data module does it, interleaved in one process: forward, backward, clipping and AdamW. Tokens
are the prompts' and responses', padding not counted; the ratio is the median over the batches with the 10th and 90th
percentile.
"""

import argparse
import functools
import platform
import statistics
import time

import torch

from datamodules.batches import TokenBatch
from datamodules.collation import packed_batch, token_batch
from datamodules.problems import find
from datamodules.steps import StepIndexed
from lightning_modules.alignment.policies import smollm2, tiny
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.policy_method import token_mean

STANDIN = {"sft": 2000, "prompts": 8, "val": 4, "test": 4, "misconception": 0.6, "slip": 0.0}


def solutions(policy: Policy) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """(where they are from, prompt and response tokens)."""
    source = find("gsm8k", None, False, val_size=4, seed=1, standin=STANDIN)
    encode, eos = policy.tokenizer.encode, policy.tokenizer.eos_token_id
    rows = [(encode(f"{row.question}\n"), [*encode(row.solution), eos]) for row in source.parts["sft"]]
    return source.name, [row for row in rows if len(row[0]) <= 1024 and len(row[1]) <= 400]


def timed(policy: Policy, optimizer: torch.optim.Optimizer, batch: TokenBatch) -> float:
    """Seconds of one training step."""
    device = policy.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        scores = policy(batch["ids"], batch["mask"], batch.get("positions"))
        loss = token_mean(-scores.log_probs, batch["token_share"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(
    policy: Policy, rows: list[tuple[list[int], list[int]]], size: int, rooms: list[int], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], float]:
    """(seconds a step, share of the positions that hold a token, mean tokens of a step), the first two by side."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    lengths, pad = [len(prompt) + len(response) for prompt, response in rows], policy.tokenizer.pad_token_id
    steps = StepIndexed(lengths, lengths, size, 1, lambda numbers, share: ([rows[n] for n in numbers], share))
    sides = {"padded": functools.partial(token_batch, pad=pad)}
    for room in rooms:
        sides[f"packed, {room}"] = functools.partial(packed_batch, pad=pad, multiple=1, room=room)
    seconds, filled = {side: [] for side in sides}, {side: [] for side in sides}
    timed(policy, optimizer, token_batch(*steps[0][:1], pad, steps[0][1]))  # the first step warms up
    for step in range(1, repeats + 1):
        chosen, tokens = steps[step]
        for side, cook in sides.items():
            batch = cook(chosen, token_share=tokens)
            seconds[side].append(timed(policy, optimizer, batch))
            filled[side].append(tokens / batch["ids"].numel())
    return seconds, filled, statistics.mean(steps[step][1] for step in range(1, repeats + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rooms", type=int, nargs="+", default=[512], help="tokens of a packed row")
    parser.add_argument("--repeats", type=int, default=16, help="batches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cuda runs under bfloat16 autocast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = (tiny(context=2048) if options.policy == "tiny" else smollm2()).to(options.device).train()
    name, rows = solutions(policy)
    seconds, filled, tokens = race(policy, rows, options.rows, options.rooms, options.repeats)
    print(f"{options.policy}, SFT on {name}, {options.rows} rows of {tokens / options.rows:.0f} tokens")
    print(f"torch {torch.__version__}, {platform.machine()} {options.device}, {options.threads} thread(s)")
    for side, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["padded"], times))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        print(
            f"{side:>14}: {tokens / statistics.mean(times):7.0f} tokens/s, {statistics.mean(filled[side]):.1%} filled, "
            f"{statistics.median(ratios):.2f} x padded [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
