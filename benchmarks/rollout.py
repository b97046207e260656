"""Throughput of `generate` beside transformers' `model.generate`: same weights, prompts, sampler and batches.

    python benchmarks/rollout.py [--policy tiny|smollm2] [--repeats 5] [--threads 1]

Two cases. "equal": no response ends before `max_new`, so both sides compute the same tokens. "ragged": responses end at
different steps, as real ones do. Neither random weights nor a real model fed with random tokens stop by themselves, so
the end token gets a constant added to its logit (on both sides, as a bias of the output layer), chosen from the logits
after the prompts such that a response ends after about `max_new / 2` tokens; in the equal case it never does. Tokens
after the end are not counted. The sides alternate within a repeat, so that a slow moment of the machine hits both; the
ratio is given by the wall's clock and by processor time, which other programs on the machine hardly change.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import nn

from lightning_modules.alignment.generation import Sampling, batches, generate
from lightning_modules.alignment.policies import smollm2, tiny
from lightning_modules.alignment.policy import Policy

CASES = ("equal", "ragged")
# (prompts, samples a prompt, prompt lengths, tokens, rows in a batch)
SIZES = {"tiny": (128, 8, (25, 43), 110, 512), "smollm2": (4, 4, (40, 60), 48, 16)}


@torch.no_grad()
def bias_end(policy: Policy, prompts: list[list[int]], mean_length: float) -> None:
    """Add to the logit of the end token what makes it `1 / mean_length` likely after the prompts."""
    head = policy.causal_lm.get_output_embeddings()
    logits = torch.stack([policy.model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    gap = (logits.logsumexp(-1) - logits[:, policy.stop_ids[0]]).mean()
    bias = torch.zeros(head.out_features, dtype=head.weight.dtype)
    bias[policy.stop_ids] = gap - math.log(mean_length)
    head.bias = nn.Parameter(bias, requires_grad=False)


def ours(policy: Policy, prompts: list[list[int]], k: int, sampling: Sampling, rows: int) -> int:
    """Sampled tokens."""
    return sum(
        len(sample.ids) for _, samples in generate(policy, prompts, k, sampling, None, rows) for sample in samples
    )


@torch.inference_mode()
def theirs(policy: Policy, prompts: list[list[int]], k: int, sampling: Sampling, rows: int) -> int:
    """Sampled tokens, with transformers' own loop over the same batches."""
    tokens = 0
    for batch in batches([len(prompt) for prompt in prompts], k, rows):
        inputs = policy.tokenizer.pad(
            {"input_ids": [prompts[position] for position in batch]}, padding_side="left", return_tensors="pt"
        )
        output = policy.model.generate(
            **inputs,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_new,
            num_return_sequences=k,
            eos_token_id=policy.stop_ids,
            pad_token_id=policy.tokenizer.pad_token_id,
        )
        ended = torch.isin(output[:, inputs["input_ids"].shape[1] :], torch.tensor(policy.stop_ids))
        tokens += int((ended.cumsum(1) - ended.long() == 0).sum())
    return tokens


class Rate(NamedTuple):
    """What a side samples: tokens a second, tokens a second of processor time, tokens."""

    wall: float
    processor: float
    tokens: int


def rate(side: Callable[..., int], *args) -> Rate:
    """Sample once."""
    wall, processor = time.perf_counter(), time.process_time()
    tokens = side(*args)
    return Rate(tokens / (time.perf_counter() - wall), tokens / (time.process_time() - processor), tokens)


def measure(name: str, case: str, repeats: int) -> None:
    """Print one line for the case."""
    count, k, (low, high), max_new, rows = SIZES[name]
    policy = {"tiny": tiny, "smollm2": smollm2}[name]().eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    prompts = [torch.randint(300, 595, (length,), generator=generator).tolist() for length in lengths]
    bias_end(policy, prompts[:4], 1e9 if case == "equal" else max_new / 2)
    args = (policy, prompts, k, Sampling(max_new=max_new), rows)
    pairs = [(rate(ours, *args), rate(theirs, *args)) for _ in range(repeats + 1)][1:]  # the first warms up
    found = []
    for clock in ("wall", "processor"):
        ratios = sorted(getattr(mine, clock) / getattr(other, clock) for mine, other in pairs)
        spread = f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        mine, other = (statistics.median(getattr(pair[side], clock) for pair in pairs) for side in (0, 1))
        found.append(f"{clock} {mine:.0f} and {other:.0f} tokens/s, ratio {statistics.median(ratios):.2f} {spread}")
    counts = f"{pairs[0][0].tokens} and {pairs[0][1].tokens} tokens, n={repeats}"
    print(f"{name} {case}, ours and transformers: {'; '.join(found)}; {counts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=SIZES, default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.processor() or platform.machine()}, {options.threads} thread(s)"
    )
    for case in CASES:
        measure(options.policy, case, options.repeats)


if __name__ == "__main__":
    main()
