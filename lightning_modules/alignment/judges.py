"""Judges of two answers to one prompt, on the trunk of a language policy: by embeddings, or by reading both at once.

A judge is called with the tensors of a `PreferenceBatch` and gives log-odds that the first answer is the better one. As
an oracle it takes text: `prefer`, `score` and `table`.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.batches import Prompt
from lightning_modules.alignment.policies import pretrained
from lightning_modules.alignment.policy import Policy, fingerprint, folder_at_once
from lightning_modules.alignment.preference_embedding import cross_entropy, scalar_embedding, score, score_matrix
from lightning_modules.alignment.rollout import padded

HEAD, ABOUT = "head.safetensors", "judge.json"  # of an exported judge, beside its trunk
ROWS_AT_ONCE = 32  # answers in one pass of the trunk when a judge is asked as an oracle
GATE_SCALES = ("sum1", "mean1")


class Embedded(NamedTuple):
    """Answers as vectors of 2k numbers, and the weight lambda of each plane at their prompt; float32."""

    vectors: Float[Tensor, "batch answers d"]
    scale: Float[Tensor, "batch k"] | None


class Gate(nn.Module):
    """lambda(x) >= 0 from the hidden state of the prompt's last token (section 4.2): softmax over the planes.

    `scale` is sum1, the released models' and the default, or mean1: times k, so that the weights have mean 1.
    """

    def __init__(self, width: int, planes: int, scale: str = "sum1") -> None:
        super().__init__()
        if scale not in GATE_SCALES:
            raise ValueError(f"model.judge.head.gate_scale={scale}: there are {' and '.join(GATE_SCALES)}")
        self.linear = nn.Linear(width, planes, bias=False)
        self.total = planes if scale == "mean1" else 1

    def forward(self, prompt: Float[Tensor, "batch width"]) -> Float[Tensor, "batch k"]:
        """Weights of the planes."""
        return self.total * torch.softmax(self.linear(prompt), -1)


class EmbeddingHead(nn.Module):
    """GPM's head: an even number `dim` of coordinates at the end token, of unit length if `normalise` (section 4)."""

    def __init__(self, width: int, dim: int, normalise: bool, gate: bool, gate_scale: str = "sum1") -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"model.judge.head.dim={dim}: an embedding is made of planes, so take 2, 4, 6, ...")
        self.settings = {
            "head": "EmbeddingHead", "dim": dim, "normalise": normalise, "gate": gate, "gate_scale": gate_scale
        }  # fmt: skip
        self.linear = _projection(width, dim)
        self.normalise = normalise
        self.gate = Gate(width, dim // 2, gate_scale) if gate else None

    def forward(self, end: Float[Tensor, "batch answers width"], prompt: Float[Tensor, "batch width"]) -> Embedded:
        """From the hidden states at the end of each answer and of the prompt; always in float32."""
        with torch.autocast(end.device.type, enabled=False):
            vectors = self.linear(end.float())
            if self.normalise:
                vectors = F.normalize(vectors, dim=-1, eps=1e-12)
            return Embedded(vectors, None if self.gate is None else self.gate(prompt.float()))


class RewardHead(nn.Module):
    """Bradley-Terry's head: `dim` rewards at the end token, mixed by a gate on the prompt where there are several.

    With dim 1 it is a reward model; with more, a scalar of the same capacity as GPM's head: the control of what planes
    bring beside parameters.
    """

    def __init__(self, width: int, dim: int = 1, gate: bool = False) -> None:
        super().__init__()
        if dim < 1 or (dim > 1 and not gate):
            raise ValueError(
                f"model.judge.head.dim={dim}: one reward, or several that model.judge.head.gate=true mixes"
            )
        self.settings = {"head": "RewardHead", "dim": dim, "gate": gate}
        self.linear = _projection(width, dim)
        self.gate = Gate(width, dim) if gate else None

    def forward(self, end: Float[Tensor, "batch answers width"], prompt: Float[Tensor, "batch width"]) -> Embedded:
        """As `EmbeddingHead.forward`, with the constant coordinate that makes a score a difference of rewards."""
        with torch.autocast(end.device.type, enabled=False):
            vectors = scalar_embedding(self.linear(end.float()))
            return Embedded(vectors, None if self.gate is None else self.gate(prompt.float()))


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
        found = [self(*_laid_out([(p, [a, b]) for p, a, b in part], self.policy)) for part in parts]
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
        found = [self.embed(*_laid_out([(prompt, part)], self.policy)) for part in parts]
        return Embedded(torch.cat([part.vectors for part in found], 1), found[0].scale)

    def matrix(self, prompt: list[int], answers: Sequence[list[int]]) -> Float[Tensor, "k k"]:
        return score_matrix(*self.represent(prompt, answers))[0] / self.tau


class PairwiseJudge(Judge):
    """PairPM (RLHFlow): the trunk reads both answers and says A or B; order matters, so both orders are averaged.

    The text is `[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \\n` around the prompt's and the answers'
    own tokens; RLHFlow puts it into one user turn of the chat template. k answers take k (k - 1) passes.
    """

    PIECES = ("[CONTEXT] ", " [RESPONSE A] ", " [RESPONSE B] ", " \n")

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        encoded = [policy.tokenizer.encode(text, add_special_tokens=False) for text in (*self.PIECES, "A", "B")]
        self.pieces, labels = encoded[:-2], encoded[-2:]
        if any(len(label) != 1 for label in labels):
            raise ValueError("PairPM answers with one token, and A or B is none of this policy's: take model=gpm")
        self.labels = [label[0] for label in labels]

    def logits(
        self, ids: Int[Tensor, "pair 2 length"], mask: Bool[Tensor, "pair 2 length-1"]
    ) -> Float[Tensor, "pair 2 vocabulary"]:
        """Logits of the next token after the pair as it stands, and after the pair in the other order."""
        rows = [self._texts(*row) for row in zip(ids.tolist(), mask.tolist())]
        texts = [text for row in rows for text in row]
        packed = nn.utils.rnn.pad_sequence([torch.tensor([*text, 0]) for text in texts], batch_first=True)
        last = torch.tensor([len(text) - 1 for text in texts])
        asked = torch.zeros(packed.shape[0], packed.shape[1] - 1, dtype=torch.bool)
        asked[torch.arange(len(texts)), last] = True
        return self.policy(packed.to(ids.device), asked.to(ids.device), logits=True).logits.unflatten(0, (-1, 2))

    def _texts(self, ids: list[list[int]], mask: list[list[bool]]) -> tuple[list[int], list[int]]:
        prompt = ids[0][: mask[0].index(True) + 1]
        first, second = (self._answer(row, marked) for row, marked in zip(ids, mask))
        context, a, b, end = self.pieces
        return context + prompt + a + first + b + second + end, context + prompt + a + second + b + first + end

    def _answer(self, ids: list[int], mask: list[bool]) -> list[int]:
        answer = [token for token, marked in zip(ids[1:], mask) if marked]
        return answer[:-1] if answer[-1] in self.policy.stop_ids else answer

    def forward(
        self, ids: Int[Tensor, "pair 2 length"], mask: Bool[Tensor, "pair 2 length-1"]
    ) -> Float[Tensor, " pair"]:
        return swap_averaged(self.logits(ids, mask)[..., self.labels])

    def fit(
        self,
        ids: Int[Tensor, "pair 2 length"],
        mask: Bool[Tensor, "pair 2 length-1"],
        label: Float[Tensor, " pair"],
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
        """The language-modelling loss of the answer A or B, over both orders; RLHFlow draws one of them."""
        logits = self.logits(ids, mask)
        log_p = torch.log_softmax(logits, -1)[..., self.labels]  # of A and B, in the order as it stands and exchanged
        p = torch.stack([label, 1 - label], -1)
        loss = -(p * log_p[:, 0] + p.flip(-1) * log_p[:, 1]).sum(-1) / 2
        return loss, swap_averaged(logits[..., self.labels])

    def matrix(self, prompt: list[int], answers: Sequence[list[int]]) -> Float[Tensor, "k k"]:
        matrix = torch.zeros(len(answers), len(answers))
        above = [(i, j) for i in range(len(answers)) for j in range(i)]
        for begin in range(0, len(above), ROWS_AT_ONCE // 2):
            part = above[begin : begin + ROWS_AT_ONCE // 2]
            scores = self(*_laid_out([(prompt, [answers[i], answers[j]]) for i, j in part], self.policy)).cpu()
            for (i, j), value in zip(part, scores):
                matrix[i, j], matrix[j, i] = value, -value
        return matrix


def swap_averaged(logits: Float[Tensor, "pair 2 2"]) -> Float[Tensor, " pair"]:
    """Log-odds of the mean of P(A | first, second) and P(B | second, first), from (order, label) logits.

    The other order's mean is 1 minus this one, whatever the logits: P(i, j) + P(j, i) = 1.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    for_first = torch.logaddexp(log_p[:, 0, 0], log_p[:, 1, 1])
    return for_first - torch.logaddexp(log_p[:, 0, 1], log_p[:, 1, 0])


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


HEADS = {head.__name__: head for head in (EmbeddingHead, RewardHead)}


def new_head(settings: dict[str, Any], width: int) -> nn.Module:
    """A head by its `settings`, untrained."""
    return HEADS[settings["head"]](width, **{name: value for name, value in settings.items() if name != "head"})


def export(about: dict[str, Any], policy: Policy, head: nn.Module | None, folder: Path) -> Path:
    """Write a judge: its trunk as transformers loads it, its head, and what it is (`Judge.about`).

    The folder is complete or absent; an earlier one is replaced. Raises RuntimeError when the weights are sharded.
    """
    with folder_at_once(folder) as temporary:
        policy.export(temporary)
        if head is not None:
            save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, temporary / HEAD)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return folder


def load(folder: str | Path) -> Judge:
    """The judge that `export` wrote, in eval mode, ready to be asked as an oracle.

    Raises FileNotFoundError where the folder holds none.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise FileNotFoundError(
            f"{folder} is no export of a judge (it has no {ABOUT}): give the export/ folder of a run of model=gpm, "
            "model=bt or model=pairpm"
        )
    about, policy = json.loads((folder / ABOUT).read_text()), pretrained(str(folder))
    if "head" in about:
        judge: Judge = EmbeddingJudge(policy, partial(new_head, about["head"]), about["tau"])
        judge.head.load_state_dict(load_file(folder / HEAD))
    else:
        judge = PairwiseJudge(policy)
    return judge.requires_grad_(False).eval()


def _projection(width: int, dim: int) -> nn.Linear:
    """Without bias, N(0, 1 / (width + 1)) in standard deviation, as the released code."""
    linear = nn.Linear(width, dim, bias=False)
    nn.init.normal_(linear.weight, std=1 / (width + 1))
    return linear


def _laid_out(
    rows: Sequence[tuple[list[int], Sequence[list[int]]]], policy: Policy
) -> tuple[Int[Tensor, "batch answers length"], Bool[Tensor, "batch answers length-1"]]:
    """(ids, mask) of answers side by side, right-padded, on the policy's device."""
    ids, mask = padded([(prompt, answer) for prompt, answers in rows for answer in answers], policy)
    return ids.unflatten(0, (len(rows), -1)), mask.unflatten(0, (len(rows), -1))
