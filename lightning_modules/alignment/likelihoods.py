"""Probabilities of all of a game's replies: many short answers to a prompt in one row, as a tree behind the prompt."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.alignment.policy import Policy

ROWS_AT_ONCE = 16  # prompts of a forward


@torch.inference_mode()
def likelihoods(policy: Policy, prompts: list[list[int]], answers: list[list[int]]) -> Float[Tensor, "prompt answer"]:
    """Log-probabilities (nats, float32) of each of the answers to each of the prompts.

    Whatever answers begin with in common is computed once: its tokens are the nodes of a tree that see the prompt and
    the way from it to them. For architectures that take an attention mask of that kind, such as the tiny policy's.
    """
    nodes = sorted({tuple(answer[:n]) for answer in answers for n in range(1, len(answer))}, key=len)
    place = {(): 0} | {node: number for number, node in enumerate(nodes, 1)}
    steps = [
        (row, place[tuple(answer[:n])], answer[n]) for row, answer in enumerate(answers) for n in range(len(answer))
    ]
    row, node, token = torch.tensor(steps, device=policy.device).T
    found = []
    for at in range(0, len(prompts), ROWS_AT_ONCE):
        logits = _logits(policy, prompts[at : at + ROWS_AT_ONCE], nodes)
        values = logits.float().log_softmax(-1)[:, node, token]
        found.append(values.new_zeros(len(values), len(answers)).index_add(1, row, values))
    return torch.cat(found).cpu()


def _logits(
    policy: Policy, prompts: list[list[int]], nodes: list[tuple[int, ...]]
) -> Float[Tensor, "prompt node vocabulary"]:
    """Logits of what follows the prompt itself (the first node) and each of the others."""
    longest, lengths = max(map(len, prompts)), torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) + [node[-1] for node in nodes] for prompt in prompts])
    depths = torch.tensor([len(node) for node in nodes], dtype=torch.long)
    positions = torch.cat([torch.arange(longest).expand(len(prompts), -1), lengths[:, None] - 1 + depths], 1)
    device = policy.device
    hidden = policy.causal_lm.base_model(
        input_ids=ids.to(device),
        attention_mask=_visible(lengths, longest, nodes)[:, None].to(device),
        position_ids=positions.to(device),
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(prompts), device=device)[:, None]
    kept = torch.cat([lengths[:, None] - 1, torch.arange(longest, ids.shape[1]).expand(len(prompts), -1)], 1)
    return policy.causal_lm.get_output_embeddings()(hidden[rows, kept.to(device)])


def _visible(
    lengths: Int[Tensor, " prompt"], longest: int, nodes: list[tuple[int, ...]]
) -> Bool[Tensor, "prompt length length"]:
    """Whether a position (second axis) sees another one (third); padding sees what is before it."""
    on_the_way = torch.tensor([[node[: len(other)] == other for other in nodes] for node in nodes])
    size = longest + len(nodes)
    visible = torch.ones(size, size, dtype=torch.bool).tril().repeat(len(lengths), 1, 1)
    visible[:, longest:, :longest] = (torch.arange(longest) < lengths[:, None])[:, None]
    visible[:, longest:, longest:] = on_the_way.view(len(nodes), len(nodes))
    return visible
