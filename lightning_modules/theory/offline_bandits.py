"""Learning from a log: KL-PCB and KL-PCDB (pessimism), f-CB, and two-stage mixed sampling.

KL-PCB, KL-PCDB and f-CB: arXiv 2502.06051. TMPS and TMPS-PF: arXiv 2411.04625. All of them estimate rewards, subtract a
bonus, and take the regularised optimum for the difference; they differ in feedback, divergence, bonus and who samples.
"""

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batches import Bandit, BanditLog
from lightning_modules.theory.asymptotics import coverage, mean_divergence
from lightning_modules.theory.bonus import Bonus
from lightning_modules.theory.decisions import regularized
from lightning_modules.theory.feedback import Feedback, Shares
from lightning_modules.theory.kl_bandits import Decision
from lightning_modules.theory.randomness import streams
from lightning_modules.theory.regularizer import Divergence
from lightning_modules.theory.samples import Samples
from lightning_modules.theory.simulation import Measured

REFERENCE, PROPOSED = 1, 2  # streams of random numbers, by who samples


class OfflineBandit(Samples):
    """What `regularizer` makes optimal for the estimate less the bonus, from samples of the reference policy.

    Rounds are samples, of `copies` data sets side by side, or the rows of the log that the data brings. With rewards
    and KL this is KL-PCB, with preferences KL-PCDB, with the chi-square divergence and no bonus f-CB.
    """

    def __init__(
        self,
        eta: float,
        feedback: Feedback,
        bonus: Bonus,
        decision: Decision,
        regularizer: Divergence,
        copies: int,
        seed: int,
        fit_from: int,
        eps: list[float],
        at: list[int],
    ) -> None:
        super().__init__(eta, copies, seed, fit_from, eps, at)
        self.feedback, self.bonus, self.decision, self.regularizer = feedback, bonus, decision, regularizer

    def meet(self, data: L.LightningDataModule) -> None:
        """Take the bandit, and the log where there is one, from the data."""
        super().meet(data)
        bandit = getattr(data, "instance", None)
        if not isinstance(bandit, Bandit) or bandit.horizons:
            raise ValueError(
                f"data={data.name} is no bandit with fixed contexts: take data=bandit with instance=tail, two_arm, "
                "covered, file, or linear with data.instance.contexts=20"
            )
        if bandit.features is not None and self.feedback.chosen == 2:
            raise ValueError("feedback=preference is for tables, and this bandit has features: take feedback=reward")
        self.problem, self.bandit = bandit.name, bandit
        self.reference = bandit.log_reference.exp()
        self.best = self.regularizer.log_policy(bandit.log_reference, bandit.reward, self.eta)
        self._take_log(data.log)
        self.register_buffer("statistics", self.feedback.blank(bandit, self.copies))
        if self.decision is regularized and (self.best > -torch.inf).all():
            self.predicted = self._predict(data.rounds)

    def _take_log(self, log: BanditLog | None) -> None:
        self.log_rows, self.behaviour = log, self.reference
        if log is None:
            return
        if log.actions.shape[1] != self.feedback.chosen:
            kind = {1: "rewards (feedback=reward)", 2: "labels of pairs (feedback=preference)"}
            raise ValueError(
                f"data.log has {kind[log.actions.shape[1]]}, and the method takes {kind[self.feedback.chosen]}"
            )
        self.copies, self.behaviour = 1, log.behaviour  # there is one log

    def _predict(self, samples: int) -> float:
        weights = self.regularizer.weights(self.bandit.log_reference, self.bandit.reward, self.eta)
        return self.feedback.rate(self.bandit, weights, self._shares(), self.eta, self.bonus, samples)

    def _shares(self) -> Shares:
        """Who takes which part of the data in the long run."""
        return [(1.0, self.behaviour)]

    def constants(self) -> dict[str, float]:
        """The coverage max pi*/pi0 and E_{pi*} D^2 by the policy that took the data."""
        distance = self.feedback.divergence(self.bandit, self.behaviour)
        return {
            "coverage": coverage(self.best, self.behaviour.log()),
            "mean_divergence": mean_divergence(self.best.exp(), distance, self.bandit.contexts),
        }

    def play(self, rounds: list[int]) -> Measured:
        if self.log_rows is not None:
            self.statistics += self.feedback.logged(self.bandit, self.log_rows, slice(rounds[0], rounds[-1] + 1))
        else:
            self.statistics += self._sampled(self.reference, len(rounds), rounds[0], REFERENCE)
        return {"gap": self.gap(self.learned(self.statistics))}

    def _sampled(self, policies: Tensor, size: int, first: int, who: int) -> Tensor:
        """`size` samples of each copy; its random numbers begin where `first` says, the number of the first sample."""
        policies = policies.expand(self.copies, *self.reference.shape)
        return self.feedback.drawn(self.bandit, policies, size, streams(self.seed, self.copies, [0, 0, first, who]))

    def learned(self, statistics: Tensor) -> Float[Tensor, "copy context action"]:
        """log of the policy that is learned from these data."""
        reference = self.bandit.log_reference
        value = self.feedback.value(statistics, self.bandit, self.bonus, self.behaviour)
        planned = self.regularizer.log_policy(reference, value, self.eta)
        return self.decision(planned, self.best, reference, value)

    def gap(self, log_policy: Float[Tensor, "copy context action"]) -> Float[Tensor, " copy"]:
        """What it lacks of the regularised optimum, exactly."""
        reward = self.bandit.reward.expand_as(log_policy)
        gaps = self.regularizer.gap(self.bandit.log_reference, reward, log_policy, self.eta)
        return (gaps * self.bandit.contexts).sum(-1)


class TwoStage(OfflineBandit):
    """A share `first` of the samples from the reference policy, the rest from the policy learned from them; then all.

    TMPS with rewards, TMPS-PF with preferences. The second stage is sampled anew for every number of samples. `first` =
    1 is the single stage, the control.
    """

    def __init__(self, first: float, **offline_bandit) -> None:
        super().__init__(**offline_bandit)
        if not 0 <= first <= 1:
            raise ValueError(f"model.first={first} must lie in [0, 1]: the share of samples from the reference policy")
        self.first = first

    def meet(self, data: L.LightningDataModule) -> None:
        if getattr(data, "log", None) is not None:
            raise ValueError(
                "model=two_stage samples with its own policy, which a log cannot answer: leave data.log out"
            )
        super().meet(data)

    def _shares(self) -> Shares:
        return [(self.first, self.reference), (1 - self.first, self.best.exp())]

    def play(self, rounds: list[int]) -> Measured:
        samples = rounds[-1] + 1
        begin, end = round(self.first * rounds[0]), round(self.first * samples)
        self.statistics += self._sampled(self.reference, end - begin, begin, REFERENCE)
        proposed = self.learned(self.statistics).exp()
        second = self._sampled(proposed, samples - end, samples, PROPOSED)
        return {"gap": self.gap(self.learned(self.statistics + second))}
