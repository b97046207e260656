"""A training that is stopped at any moment and goes on is the one that was never stopped."""

import io
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader

from datamodules.steps import FromStep, StepIndexed
from tessera.build import LightningEnvironment
from tessera.checkpoints import VerifiedCheckpointIO, newest_valid, read_manifest
from tessera.saving import Newest, random_states, restore
from tessera.stopping import Stop, Stopped

STEPS, VALIDATED, EPOCH = 12, 6, 4


@dataclass
class Moment:
    """When a signal is sent: at the n-th call of a hook."""

    hook: str
    call: int
    number: int = signal.SIGTERM
    calls: int = field(default=0, init=False)

    def now(self, hook: str) -> None:
        self.calls += hook == self.hook
        if hook == self.hook and self.calls == self.call:
            os.kill(os.getpid(), self.number)


class Line(L.LightningModule):
    """The smallest module that trains with noise, in training and in validation.

    Python's own generator has a test of its own: the type checker of the tests draws from it.
    """

    def __init__(self, folder: Path, moment: Moment | None):
        super().__init__()
        self.weight, self.folder, self.moment = torch.nn.Parameter(torch.zeros(1)), folder, moment
        self.validated: list[tuple[int, float]] = []
        self.on_disk: list[tuple[int, list[int]]] = []
        self._drawn: list[float] = []

    def training_step(self, batch, batch_idx):
        if self.moment:
            self.moment.now("step")
        noise = torch.rand(1) + np.random.rand()
        # noise enters once a step, so that a step in one micro-batch and in three agree
        noise = noise.float() if batch["first"] else 0.0
        return ((self.weight - batch["rows"]).square() / batch["share"]).sum() + self.weight.sum() * noise

    def validation_step(self, batch, batch_idx):
        if self.moment:
            self.moment.now("validation")
        self._drawn.append(torch.rand(1).item())

    def on_validation_epoch_end(self):
        self.validated.append((self.global_step, sum(self._drawn)))
        self._drawn = []
        self.on_disk.append((self.global_step, sorted(entry["step"] for entry in read_manifest(self.folder).values())))

    def on_save_checkpoint(self, checkpoint):
        if self.moment:
            self.moment.now("save")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def batches(accumulate: int) -> StepIndexed:
    def cook(rows, share):
        return {"rows": torch.tensor(rows).float(), "share": share, "first": 0 in [row % 3 for row in rows]}

    rows = 3 * EPOCH
    return StepIndexed([1] * rows, [1] * rows, batch_size=3, seed=1, cook=cook, accumulate=accumulate)


def trained(
    folder: Path,
    accumulate: int = 1,
    every: int = 5,
    keep: int = 100,
    moment: Moment | None = None,
    asynchronous: bool = False,
    validated: int = VALIDATED,
) -> Line:
    """Twelve steps in epochs of four, validated at every sixth on three batches; from the newest checkpoint, if any."""
    line, stop, written = Line(folder, moment), Stop(), VerifiedCheckpointIO(keep)
    trainer = L.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        val_check_interval=validated * accumulate,
        check_val_every_n_epoch=None,
        callbacks=[Newest(folder, every, validated, stop)],
        plugins=[AsyncCheckpointIO(written) if asynchronous else written, LightningEnvironment()],
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer._signal_connector.register_signal_handlers = lambda: None
    data = batches(accumulate)
    loader = DataLoader(data, sampler=FromStep(data, lambda: trainer.global_step), batch_size=None)
    newest = newest_valid(folder)[0]
    if newest is None:
        L.seed_everything(3, verbose=False)
    try:
        with stop.listening():
            trainer.fit(line, loader, DataLoader(torch.ones(3)), ckpt_path=newest and str(newest), weights_only=True)
    except Stopped as stopped:
        line.stopped = stopped
    return line


def outcome(line: Line) -> tuple[float, list[tuple[int, float]]]:
    return line.weight.item(), line.validated


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Line:
    return trained(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("moment", "step"),
    [
        (Moment("step", 1), 1),  # the first step
        (Moment("step", 3, signal.SIGINT), 3),
        (Moment("step", 4, signal.SIGUSR1), 4),  # the last of an epoch
        (Moment("step", 6), 6),  # a step that is validated: stopped before its validation
        (Moment("validation", 1), 6),
        (Moment("validation", 2, signal.SIGINT), 6),
        (Moment("validation", 3), 6),
        (Moment("save", 1), 5),  # while a checkpoint is saved
        (Moment("step", 12), 12),  # the last step, whose validation is finished first
    ],
    ids=lambda value: f"{value.hook}-{value.call}" if isinstance(value, Moment) else None,
)
def test_a_run_stopped_by_a_signal_goes_on_as_if_it_never_was(moment, step, accumulate, tmp_path):
    def fresh(hook, call):
        return Moment(hook, (call - 1) * accumulate + 1 if hook == "step" else call, moment.number)

    whole = trained(tmp_path / "whole", accumulate)
    first = trained(tmp_path / "run", accumulate, moment=fresh(moment.hook, moment.call))
    assert first.stopped.signal == moment.number
    assert first.stopped.code == (130 if moment.number == signal.SIGINT else 143)
    saved_at = max(entry["step"] for entry in read_manifest(tmp_path / "run").values())
    assert saved_at in (step, step + 1)  # a signal within a save is seen at the end of the next step
    second = trained(tmp_path / "run", accumulate)
    assert second.weight.item() == whole.weight.item()
    assert first.validated + second.validated == whole.validated


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_stopped_at_any_step_is_the_undisturbed_one(step, tmp_path, undisturbed):
    first = trained(tmp_path, moment=Moment("step", step))
    second = trained(tmp_path)
    assert second.weight.item() == undisturbed.weight.item()
    assert first.validated + second.validated == undisturbed.validated


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("hook", "call"), [("validation", 1), ("validation", 3), ("validation", 5), ("step", EPOCH)])
def test_a_run_stopped_in_the_validation_at_the_end_of_an_epoch_goes_on(hook, call, accumulate, tmp_path):
    whole = trained(tmp_path / "whole", accumulate, validated=EPOCH)
    call = (call - 1) * accumulate + 1 if hook == "step" else call
    first = trained(tmp_path / "run", accumulate, moment=Moment(hook, call), validated=EPOCH)
    assert first.stopped.code == 143
    second = trained(tmp_path / "run", accumulate, validated=EPOCH)
    assert second.trainer.current_epoch == whole.trainer.current_epoch
    assert second.weight.item() == whole.weight.item()
    assert first.validated + second.validated == whole.validated


def test_a_run_that_saves_in_a_second_thread_has_written_all_when_it_is_stopped(tmp_path, undisturbed):
    first = trained(tmp_path, moment=Moment("step", 7), asynchronous=True)
    assert sorted(entry["step"] for entry in read_manifest(tmp_path).values()) == [5, 7]
    second = trained(tmp_path, asynchronous=True)
    assert second.weight.item() == undisturbed.weight.item()
    assert first.validated + second.validated == undisturbed.validated


@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1)])
@pytest.mark.parametrize("step", [3, 4, 6, 7])
def test_a_run_goes_on_in_another_number_of_micro_batches(before, now, step, tmp_path):
    trained(tmp_path, before, moment=Moment("step", (step - 1) * before + 1))
    second = trained(tmp_path, now)
    assert second.trainer.global_step == STEPS
    assert [at for at, _ in second.validated] == [at for at in (6, 12) if at >= step]


def test_the_states_of_all_generators_are_kept():
    states = random_states()
    drawn = [random.random(), np.random.standard_normal(), torch.rand(1).item()]
    torch.save(states, file := io.BytesIO())
    file.seek(0)
    restore(torch.load(file, weights_only=True))
    assert [random.random(), np.random.standard_normal(), torch.rand(1).item()] == drawn


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_newest_checkpoints_are_kept_also_at_the_end_of_an_epoch(accumulate, tmp_path):
    trained(tmp_path / "all", accumulate, every=2)
    assert sorted(entry["step"] for entry in read_manifest(tmp_path / "all").values()) == [2, 4, 6, 8, 10, 12]
    trained(tmp_path / "two", accumulate, every=2, keep=2)
    files = [path.name for path in sorted((tmp_path / "two").glob("*"))]
    assert files == ["manifest.json", "step-000010.ckpt", "step-000012.ckpt"]
    assert sorted(read_manifest(tmp_path / "two")) == files[1:]


def test_a_validated_step_is_saved_after_its_validation(tmp_path):
    line = trained(tmp_path, every=3)
    assert line.on_disk == [(6, [3]), (12, [3, 6, 9])]


def test_a_second_ctrl_c_stops_at_once():
    stop = Stop()
    with stop.listening():
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == signal.SIGINT
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_repeated_sigterm_does_not_break_the_save_that_the_first_one_asked_for():
    stop = Stop()
    with stop.listening():
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM


def test_outside_of_training_a_signal_stops_at_once_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with pytest.raises(Stopped) as stopped, stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
