"""Learning from pairs: DPO and its relatives, each a loss of two log-ratios."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from matplotlib.figure import Figure
from torch import Tensor

from datamodules.batches import PackedPreferenceBatch, Pair, PreferenceBatch, TokenBatch
from lightning_modules.alignment.policy import unsharded
from lightning_modules.alignment.policy_method import PolicyMethod, reply_nll
from lightning_modules.alignment.preference_figures import preferences
from lightning_modules.alignment.rollout import score_responses

SHOWN = 128  # training pairs in a figure


class Compared(NamedTuple):
    """What the policy says of the two responses of each pair, against the reference (nats, sums over tokens)."""

    log_probs: Float[Tensor, "pair 2"]
    log_ratios: Float[Tensor, "pair 2"]
    lengths: Int[Tensor, "pair 2"]
    kl: Float[Tensor, "pair 2"]


class Preference(PolicyMethod):
    """A policy moved away from its reference by a loss of pairs, `loss(a, b, ...)` of `pairwise`.

    The reference is the policy that the run starts from; its log-probabilities come with the pairs, so that a step
    costs no second network. A loss that asks for `label`, `value` or `lengths` is given them.
    """

    batch_type: ClassVar[type] = PreferenceBatch
    packs: ClassVar[bool] = True
    unchecked: ClassVar[tuple[str, str]] = ("val/pair_accuracy", "max")

    def __init__(self, loss: Callable[..., Tensor], **policy_method: Any) -> None:
        super().__init__(**policy_method)
        parameters = inspect.signature(loss).parameters
        self.loss, self.asked = loss, [name for name in ("label", "value", "lengths") if name in parameters]
        self.beta = parameters["beta"].default if "beta" in parameters else 1.0
        one = torch.ones(1)
        # what its hyperparameters say that cannot be is refused here, before anything is sampled or trained
        self.losses(one, one, {"label": one, "value": torch.ones(1, 2)}, torch.ones(1, 2, dtype=torch.long))

    def losses(
        self,
        a: Float[Tensor, " pair"],
        b: Float[Tensor, " pair"],
        batch: dict[str, Any],
        lengths: Int[Tensor, "pair 2"],
    ) -> Float[Tensor, " pair"]:
        """The loss of every pair. Raises ValueError where it needs a `value` that the data does not have."""
        known = {**batch, "lengths": lengths}
        if "value" in self.asked and "value" not in batch:
            raise ValueError(
                "this loss needs the outcomes of both responses (`value`), which the pairs do not have: take "
                "pairwise=sppo_hard or another loss of labels, or data with win rates"
            )
        return self.loss(a, b, **{name: known[name] for name in self.asked})

    def compare(self, batch: PreferenceBatch | PackedPreferenceBatch) -> Compared:
        """Both responses under policy and reference."""
        if "branch" in batch:
            ids, mask, lp_ref = batch["ids"], batch["mask"], batch["lp_ref"]
            log_probs = self.policy(ids, mask, batch["positions"], batch["branch"]).log_probs
        else:
            ids, mask, lp_ref = (batch[name].flatten(0, 1) for name in ("ids", "mask", "lp_ref"))
            log_probs = self.policy(ids, mask).log_probs
        log_ratios = log_probs - lp_ref
        d = log_ratios.detach()
        lengths = per_response(mask, batch)
        # as `k3`, an estimate of KL(pi || pi_ref) per token where a response was sampled from pi
        kl = per_response(torch.expm1(-d) + d, batch) / lengths
        return Compared(per_response(log_probs, batch), per_response(log_ratios, batch), lengths, kl)

    def training_step(self, batch: PreferenceBatch | PackedPreferenceBatch, batch_idx: int) -> Tensor:
        compared = self.compare(batch)
        loss = self.losses(*compared.log_ratios.unbind(1), batch, compared.lengths).mean()
        if self.logs_now:
            self.log_step(loss, **self.report(compared, batch["label"]))
        return loss

    @torch.no_grad()
    def report(self, compared: Compared, label: Float[Tensor, " pair"]) -> dict[str, Tensor]:
        """Means over the pairs: rewards beta log(pi / pi_ref), log-probabilities (nats) and lengths (tokens) of the
        better and of the worse response, and `kl` per token (`k3`), an indicator of drift on responses of others.
        """
        named = {
            "rewards": self.beta * compared.log_ratios,
            "logps": compared.log_probs,
            "lengths": compared.lengths.float(),
        }
        found = {}
        for name, columns in named.items():
            chosen, rejected = better_first(columns, label).mean(0)
            found |= {f"{name}/chosen": chosen, f"{name}/rejected": rejected}
        margins = self.beta * margin(compared.log_ratios, label)
        found |= {"rewards/margin": margins.mean(), "rewards/accuracy": accuracy(margins).mean()}
        return {**found, "kl": compared.kl.mean()}

    # Held-out pairs

    def judge(self, batch: PreferenceBatch | TokenBatch) -> None:
        """Whether the implicit reward beta log(pi / pi_ref) orders held-out pairs as their labels do.

        Of replies that have no other one beside them, the cross-entropy.
        """
        if "label" not in batch:
            nll, tokens = reply_nll(self.policy, batch)
            return self.evaluation.add(tokens, nll=nll)
        compared, label = self.compare(batch), batch["label"]
        losses = self.losses(*compared.log_ratios.unbind(1), batch, compared.lengths)
        report = self.report(compared, label)
        measured = {
            "loss": losses.mean(),
            "margin": report["rewards/margin"],
            "pair_accuracy": report["rewards/accuracy"],
        }
        kept = {name: value for name, value in report.items() if name not in ("rewards/margin", "rewards/accuracy")}
        self.evaluation.add(float(len(label)), **measured, **kept)
        self.looked_at.append(better_first(self.beta * compared.log_ratios.detach(), label))

    def begin_evaluation(self, k: int) -> None:
        super().begin_evaluation(k)
        self.looked_at: list[Float[Tensor, "pair 2"]] = []

    def figures(self) -> dict[str, Figure]:
        pairs = self.trainer.datamodule.pairs[:SHOWN]
        if self.looked_at:
            return {"preferences": preferences(torch.cat(self.looked_at), "held-out")}
        return {"preferences": preferences(self.rewards(pairs), "training")} if pairs else {}

    def rewards(self, pairs: list[Pair]) -> Float[Tensor, "pair 2"]:
        """Implicit rewards of the better and of the worse response of given pairs; every process calls it."""
        rows = [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
        said = torch.tensor([sum(values) for values in score_responses(unsharded(self.policy), rows)])
        reference = torch.tensor([sum(values) for pair in pairs for values in pair.lp_ref])
        label = torch.tensor([pair.label for pair in pairs])
        return better_first(self.beta * (said - reference).unflatten(0, (-1, 2)), label)

    # The reference

    def with_reference(self, pairs: list[Pair], folder: Path) -> list[Pair]:
        """Pairs with the log-probabilities of the policy that the run starts from, or of it without its adapter.

        Computed once and kept under `folder`: once the policy has moved, in a resumed run as well, they come from there
        or the run stops.
        """
        rows = [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
        values = self._stored("reference", rows, lambda: score_responses(unsharded(self.policy), rows), folder)
        return [replace(pair, lp_ref=(values[2 * i], values[2 * i + 1])) for i, pair in enumerate(pairs)]


def per_response(
    values: Shaped[Tensor, "rows steps"], batch: PreferenceBatch | PackedPreferenceBatch
) -> Shaped[Tensor, "pair 2"]:
    """Sums over the tokens of each response; `values` are zero outside the mask."""
    if "branch" not in batch:
        return values.sum(1).unflatten(0, (-1, 2))
    mask, values = batch["mask"], values.long() if values.dtype == torch.bool else values
    branch = batch["branch"][:, :-1][mask]
    sums = values.new_zeros(2 * len(batch["label"]))
    column = 2 * branch.div(3, rounding_mode="floor") + branch.remainder(3) - 1
    return sums.index_add(0, column, values[mask]).unflatten(0, (-1, 2))


def better_first(columns: Float[Tensor, "pair 2"], label: Float[Tensor, " pair"]) -> Float[Tensor, "pair 2"]:
    """The columns of the better and of the worse response."""
    return torch.where((label < 0.5)[:, None], columns.flip(1), columns)


def margin(log_ratios: Float[Tensor, "pair 2"], label: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """The log-ratio of the better response minus that of the worse one; 0 where the label is a tie."""
    return (log_ratios[:, 0] - log_ratios[:, 1]) * torch.sign(label - 0.5)


def accuracy(margins: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """1 where the margin is positive, 1/2 where it is 0."""
    return 0.5 + 0.5 * torch.sign(margins)
