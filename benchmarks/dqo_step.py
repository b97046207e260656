"""What a DQO step costs beside an SFT step on the same tokens: `python benchmarks/dqo_step.py [--policy smollm2]`.

Both sides run interleaved in one process: forward, backward, clipping and AdamW on one batch of prompt and response
tokens. DQO has a value network of the policy's size or a head on the policy's trunk, and cached reference
log-probabilities. Medians over the repeats with the 10th and 90th percentile of the ratio.
"""

import argparse
import functools
import platform
import statistics
import time

import torch

from datamodules.batches import TrajectoryBatch
from lightning_modules.alignment import policies, soft_q
from lightning_modules.alignment.policy import Policy
from lightning_modules.alignment.policy_method import token_mean
from lightning_modules.alignment.value import ValueHead, ValueNetwork


def batch_of(policy: Policy, rows: int, prompt: int, response: int) -> TrajectoryBatch:
    """Random tokens; every row as long as the others, so that both sides do the same work."""
    length = prompt + response
    ids = torch.randint(2, policy.causal_lm.config.vocab_size, (rows, length))
    mask = torch.zeros(rows, length - 1, dtype=torch.bool)
    mask[:, prompt - 1 :] = True
    with torch.no_grad():
        log_probs = policy(ids.to(policy.device), mask.to(policy.device)).log_probs.cpu()
    outcome = torch.randint(0, 2, (rows,)).float()
    rewards = torch.zeros(rows, length - 1)
    rewards[:, -1] = outcome
    share = torch.tensor(float(mask.sum()))
    lengths = torch.full((rows,), prompt)
    return TrajectoryBatch(
        ids=ids, mask=mask, token_share=share, rewards=rewards, lp_mu=log_probs, lp_ref=log_probs, outcome=outcome,
        prompt_length=lengths,
    )  # fmt: skip


def sft_step(policy: Policy, batch: TrajectoryBatch) -> torch.Tensor:
    """Cross-entropy on the responses."""
    return token_mean(-policy(batch["ids"], batch["mask"]).log_probs, batch["token_share"])


def dqo_step(policy: Policy, value: torch.nn.Module, batch: TrajectoryBatch) -> torch.Tensor:
    """Both losses of DQO."""
    scores = policy(batch["ids"], batch["mask"])
    values = value(batch["ids"]) if isinstance(value, ValueNetwork) else value(scores.hidden)
    losses = soft_q.dqo(scores.log_probs, values, batch, beta=0.1)
    return losses.policy + losses.value


def timed(step, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one whole training step."""
    began = time.perf_counter()
    with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=parameters[0].is_cuda):
        loss = step()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if parameters[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def contestant(make_value, source: Policy, batch: TrajectoryBatch):
    """(a function that runs and times one step) for SFT (`make_value` None) or DQO."""
    policy = source.frozen().requires_grad_(True)
    value = make_value(policy) if make_value else None
    parameters = [*policy.parameters(), *(value.parameters() if value else ())]
    step = functools.partial(dqo_step, policy, value, batch) if value else functools.partial(sft_step, policy, batch)
    return functools.partial(timed, step, parameters, torch.optim.AdamW(parameters, lr=1e-5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=("tiny", "small", "smollm2"), default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=29, help="tokens")
    parser.add_argument("--response", type=int, default=53, help="tokens")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cuda runs under bfloat16 autocast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    make = {"tiny": policies.tiny, "small": functools.partial(policies.tiny, width=256, layers=6, hidden=512),
            "smollm2": policies.smollm2}[options.policy]  # fmt: skip
    source = make().to(options.device)
    batch = batch_of(source, options.rows, options.prompt, options.response)
    batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
    sides = {
        "sft": contestant(None, source, batch),
        "dqo, separate value": contestant(ValueNetwork, source, batch),
        "dqo, shared trunk": contestant(lambda policy: ValueHead(policy.width), source, batch),
    }
    for step in sides.values():
        step()
    seconds = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, step in sides.items():
            seconds[name].append(step())
    tokens = options.rows * (options.prompt + options.response)
    print(f"{options.policy}, {options.rows} x {options.prompt}+{options.response} tokens, {options.threads} thread(s)")
    print(f"torch {torch.__version__}, {platform.machine()}, {options.repeats} repeats, ratio [10 %, 90 %]")
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["sft"]))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        median = statistics.median(times)
        print(
            f"{name:>20}: {1e3 * median:8.2f} ms  {tokens / median:9.0f} tokens/s  "
            f"{statistics.median(ratios):.2f} x sft [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
