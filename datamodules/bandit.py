"""Bandits and decision processes with a reference policy, as tables or files, served in rounds."""

import hashlib
import logging
from dataclasses import fields
from typing import ClassVar

import torch

from datamodules.bandit_files import read_log
from datamodules.batches import Bandit, BanditLog, DecisionProcess, FreshFeatures
from datamodules.rounds import Chunks, Doubling, Rounds


class Bandits(Rounds):
    """Rounds of one problem, `instance`: of a simulation, or of the rows of `log`, a CSV file, in their order.

    Raises ValueError where the numbers do not make a problem or the log does not fit to it.
    """

    chunked: ClassVar[type[Chunks]] = Doubling

    def __init__(
        self,
        name: str,
        instance: Bandit | FreshFeatures | DecisionProcess,
        log: str | None,
        rounds: int,
        chunk: int,
        limit: int | None,
    ) -> None:
        self.instance, self.log = instance, self._read(log, instance)
        if self.log is not None:
            rounds = len(self.log.outcome)
        tables = [getattr(part, field.name) for part in (instance, self.log) if part for field in fields(part)]
        super().__init__(name, log or instance.name, _digest(tables), rounds, chunk, limit)

    @staticmethod
    def _read(path: str | None, instance: Bandit | FreshFeatures | DecisionProcess) -> BanditLog | None:
        if path is None:
            return None
        if not isinstance(instance, Bandit) or instance.horizons:
            raise ValueError(f"data.log={path}: {instance.name} has no table of rewards to compare with: instance=file")
        log = read_log(path, instance)
        difference = float((log.behaviour - instance.log_reference.exp()).abs().max())
        if difference > 1e-3:
            logging.warning(
                f"{path} was logged by another policy than the reference (a probability differs by {difference:.2g}): "
                "its propensities are taken for the coverage, and the theorems about data of the reference are void"
            )
        return log


def _digest(tables: list[object]) -> str:
    digest = hashlib.sha256()
    for table in tables:
        digest.update(table.numpy().tobytes() if isinstance(table, torch.Tensor) else repr(table).encode())
    return digest.hexdigest()
