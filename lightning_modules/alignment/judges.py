"""Judges of two answers to one prompt, on the trunk of a language policy: what they share, and the one by embeddings.

A judge is called with the tensors of a `PreferenceBatch` and gives log-odds that the first answer is the better one. As
an oracle it takes text: `prefer`, `score` and `table`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from datamodules.batches import Prompt
from lightning_modules.alignment.judge_heads import Embedded
from lightning_modules.alignment.policy import Policy, fingerprint
from lightning_modules.alignment.preference_embedding import cross_entropy, score, score_matrix
from lightning_modules.alignment.rollout import padded

ROWS_AT_ONCE = 32  # answers in one pass of the trunk when a judge is asked as an oracle


class Judge(nn.Module):
    """What judges share: a policy as trunk, and an oracle's questions in text."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    @property
    def about(self) -> dict[str, Any]:
        """What it is beside its weights, in JSON's types."""
        return {"judge": type(self).__name__}

    @property
    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on."""
        return self.about | {
            "weights": {name: fingerprint(part.state_dict()) for name, part in self.networks().items()}
        }

    def length(self, prompt: int, answers: Sequence[int]) -> int:
        """Tokens of the longest sequence that the trunk reads, from those of a prompt and of two answers to it."""
        return prompt + max(answers)

    def networks(self) -> dict[str, nn.Module]:
        """The parts that are trained, by name."""
        return {"policy": self.policy}

    def shard_units(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return self.policy.shard_units()

    def forward(
        self, ids: Int[Tensor, "pair 2 length"], mask: Bool[Tensor, "pair 2 length-1"]
    ) -> Float[Tensor, " pair"]:
        """Log-odds (nats) that the first answer of each pair is better."""
        raise NotImplementedError

    def fit(
        self,
        ids: Int[Tensor, "pair 2 length"],
        mask: Bool[Tensor, "pair 2 length-1"],
        label: Float[Tensor, " pair"],
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """(the loss of each pair, its log-odds), where `label` is the probability that the first answer is better."""
        raise NotImplementedError

    def matrix(self, prompt: list[int], answers: Sequence[list[int]]) -> Float[Tensor, "k k"]:
        """Log-odds of every answer against every other one, from tokens."""
        raise NotImplementedError

    # As an oracle

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Float[Tensor, " batch"]:
        """Log-odds (nats) that `first` beats `second`, on the CPU."""
        rows = [(self.encode_prompt(p), self.encode(a), self.encode(b)) for p, a, b in zip(prompts, first, second)]
        parts = [rows[i : i + ROWS_AT_ONCE // 2] for i in range(0, len(rows), ROWS_AT_ONCE // 2)]
        found = [self(*laid_out([(p, [a, b]) for p, a, b in part], self.policy)) for part in parts]
        return torch.cat([scores.float().cpu() for scores in found]) if found else torch.zeros(0)

    def prefer(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Float[Tensor, " batch"]:
        """P(first beats second), in [0, 1]."""
        return torch.sigmoid(self.score(prompts, first, second))

    @torch.no_grad()
    def table(self, prompt: Prompt, answers: Sequence[str]) -> Float[Tensor, "k k"]:
        """P(row beats column) of all answers to one prompt; 1/2 on the diagonal."""
        scores = self.matrix(self.encode_prompt(prompt), [self.encode(answer) for answer in answers])
        return torch.sigmoid(scores.float().cpu())

    def encode(self, answer: str) -> list[int]:
        """Tokens of an answer, the end token last."""
        tokenizer = self.policy.tokenizer
        return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt in this judge's own vocabulary.

        The prompt's own tokens, where they spell its question in this vocabulary. Raises ValueError where they do not
        and there is no chat template to make them anew.
        """
        tokenizer = self.policy.tokenizer
        if prompt.question.strip() in tokenizer.decode(prompt.ids):
            return prompt.ids
        if prompt.messages and tokenizer.chat_template:
            turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return tokenizer.encode(rendered, add_special_tokens=False)
        raise ValueError(
            f"the tokens of prompt {prompt.id} are not of the judge's tokenizer, which has no chat template to read "
            "its messages by: train the judge with the policy of the game"
        )


class EmbeddingJudge(Judge):
    """One pass of the trunk per answer: log-odds are the score of two embeddings over the temperature `tau`.

    `loss(score, label, tau)` is of `preference_embedding`.
    """

    def __init__(
        self, policy: Policy, head: Callable[..., nn.Module], tau: float, loss: Callable[..., Tensor] = cross_entropy
    ) -> None:
        super().__init__(policy)
        if tau <= 0:
            raise ValueError(f"model.judge.tau={tau}: a temperature is above 0")
        self.head, self.tau, self.loss = head(policy.width), tau, loss

    @property
    def about(self) -> dict[str, Any]:
        return super().about | {"tau": self.tau, "head": self.head.settings}

    def networks(self) -> dict[str, nn.Module]:
        return super().networks() | {"head": self.head}

    def shard_units(self) -> list[nn.Module]:
        return [*super().shard_units(), self.head]

    def embed(
        self,
        ids: Int[Tensor, "batch answers length"],
        mask: Bool[Tensor, "batch answers length-1"],
        positions: Int[Tensor, "batch answers length"] | None = None,
    ) -> Embedded:
        """Embeddings of the answers to each prompt, read at their end token, which is appended where it is missing.

        `positions` that begin anew say where a sequence begins in its row, as in `Policy.forward`.
        """
        ids, end = ended(ids, mask, self.policy.tokenizer.eos_token_id, self.policy.stop_ids)
        if positions is not None:
            positions = torch.cat([positions, positions[..., -1:] + 1, positions[..., -1:] + 2], -1).flatten(0, 1)
        flat = ids.flatten(0, 1)
        # nothing is predicted here: the empty mask keeps the output layer in the graph that DDP expects whole
        scores = self.policy(flat, torch.zeros_like(flat[:, 1:], dtype=torch.bool), positions)
        hidden = scores.hidden.unflatten(0, ids.shape[:2])
        answers = hidden.gather(2, end[..., None, None].expand(-1, -1, 1, hidden.shape[-1])).squeeze(2)
        prompt = hidden[torch.arange(len(ids), device=ids.device), 0, mask[:, 0].int().argmax(1)]
        return self.head(answers + scores.log_probs.sum(), prompt)

    def raw(self, ids: Int[Tensor, "pair 2 length"], mask: Bool[Tensor, "pair 2 length-1"]) -> Float[Tensor, " pair"]:
        """The scores s, before the temperature."""
        embedded = self.embed(ids, mask)
        return score(embedded.vectors[:, 0], embedded.vectors[:, 1], embedded.scale)

    def forward(
        self, ids: Int[Tensor, "pair 2 length"], mask: Bool[Tensor, "pair 2 length-1"]
    ) -> Float[Tensor, " pair"]:
        return self.raw(ids, mask) / self.tau

    def fit(
        self,
        ids: Int[Tensor, "pair 2 length"],
        mask: Bool[Tensor, "pair 2 length-1"],
        label: Float[Tensor, " pair"],
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        scores = self.raw(ids, mask)
        return self.loss(scores, label, self.tau), scores / self.tau

    def represent(self, prompt: list[int], answers: Sequence[list[int]]) -> Embedded:
        """Embeddings of k answers to one prompt, (1, k, d), from tokens: k passes of the trunk."""
        parts = [answers[i : i + ROWS_AT_ONCE] for i in range(0, len(answers), ROWS_AT_ONCE)]
        found = [self.embed(*laid_out([(prompt, part)], self.policy)) for part in parts]
        return Embedded(torch.cat([part.vectors for part in found], 1), found[0].scale)

    def matrix(self, prompt: list[int], answers: Sequence[list[int]]) -> Float[Tensor, "k k"]:
        return score_matrix(*self.represent(prompt, answers))[0] / self.tau


def ended(
    ids: Int[Tensor, "batch answers length"], mask: Bool[Tensor, "batch answers length-1"], eos: int, stops: list[int]
) -> tuple[Int[Tensor, "batch answers length+2"], Int[Tensor, "batch answers"]]:
    """Tokens two places longer, with an end token after every answer, and the index of the end tokens.

    An answer that ends with one of `stops` is left with `eos` in its place, however the template ends a turn. Writing
    over any last token, as the released code does, would destroy what it said. The second place is for the policy,
    which looks at all tokens but the last one.
    """
    last = mask.shape[-1] - mask.flip(-1).int().argmax(-1)
    said = ids.gather(-1, last[..., None])[..., 0]
    end = last + ~torch.isin(said, torch.tensor(stops, device=ids.device))
    return F.pad(ids, (0, 2)).scatter(-1, end[..., None], eos), end


def laid_out(
    rows: Sequence[tuple[list[int], Sequence[list[int]]]], policy: Policy
) -> tuple[Int[Tensor, "batch answers length"], Bool[Tensor, "batch answers length-1"]]:
    """(ids, mask) of answers side by side, right-padded, on the policy's device."""
    ids, mask = padded([(prompt, answer) for prompt, answers in rows for answer in answers], policy)
    return ids.unflatten(0, (len(rows), -1)), mask.unflatten(0, (len(rows), -1))
