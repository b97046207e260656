"""PairPM: the language model reads both answers and says which is better."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.alignment.judges import ROWS_AT_ONCE, Judge, laid_out
from lightning_modules.alignment.policy import Policy


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

    def length(self, prompt: int, answers: Sequence[int]) -> int:
        return prompt + sum(answers) + sum(map(len, self.pieces)) + 1  # the label that is asked for

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
            scores = self(*laid_out([(prompt, [answers[i], answers[j]]) for i, j in part], self.policy)).cpu()
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
