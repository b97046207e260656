"""Optimizers under Lightning, as their configurations make them, on a toy that has a parameter of every role."""

import copy
import functools
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.method import Method
from lightning_modules.optimizers.mars import MARS
from lightning_modules.optimizers.parameter_free import AdaGradPP
from lightning_modules.optimizers.schedules import warmup_constant
from tessera.compose import compose

CONF = Path(__file__).parents[2] / "conf" / "optimizer"
OPTIMIZERS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "none")
CONSTANT = functools.partial(warmup_constant, warmup=1)


class Toy(Method):
    """Embedding, convolution, running statistics, dropout and a matrix; loss: the square of a number."""

    def __init__(self, optimizer, break_at: int | None = None) -> None:
        super().__init__(optimizer, CONSTANT)
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 4)
        self.net = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.head = nn.Linear(4, 2)
        self.calls, self.break_at, self.seen = 0, break_at, []

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        torch.manual_seed(batch_idx)  # once a batch, however often it is evaluated

    def training_step(self, ids: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.calls += 1
        loss = (self.head(self.net(self.table(ids).mT).mean(-1)) - 1).square().mean()
        self.log_step(loss)
        return loss * math.nan if self.global_step == self.break_at else loss

    def validation_step(self, ids: torch.Tensor, batch_idx: int) -> None:
        self.seen.append(self.head.weight.detach().clone())

    def count(self, batch: torch.Tensor) -> int:
        return len(batch)


def batches() -> DataLoader:
    """The same batch ten times: a loader of Lightning's does not go on where it was."""
    torch.manual_seed(1)
    return DataLoader(torch.randint(8, (8, 6)).repeat(10, 1), batch_size=8)


def fit(method: Method, folder: Path, checkpoint: Path | None = None, **options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu", max_steps=10, gradient_clip_val=1.0, log_every_n_steps=1, num_sanity_val_steps=0,
        default_root_dir=folder, **quiet, **options,
    )  # fmt: skip
    held_out = DataLoader(torch.randint(8, (8, 6)), batch_size=8)
    trainer.fit(method, batches(), held_out, ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_configured_optimizer_trains(name, tmp_path, capfd):
    config = compose(["model=sft", "data=gsm8k", f"optimizer={name}", "optimizer.lr=0.01"])[0].optimizer
    if name in ("adam_pp", "adagrad_pp", "prodigy"):
        config = OmegaConf.merge(config, {"lr": 1.0, "d0" if name == "prodigy" else "eta_init": 0.01})
    method = Toy(instantiate(config, _convert_="all"))
    before = [p.detach().clone() for p in method.parameters()]
    trainer = fit(method, tmp_path)
    assert trainer.global_step == 10
    assert all(torch.isfinite(p).all() and not torch.equal(p, start) for p, start in zip(method.parameters(), before))
    assert ("elements" in capfd.readouterr().out) == ("groups" in config)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_method_sets_the_learning_rate_unless_the_optimizer_finds_its_own(name):
    config = compose(["model=sft", "data=gsm8k", "policy=tiny", f"optimizer={name}"])[0].optimizer
    assert config.lr == (1.0 if name in ("adam_pp", "adagrad_pp", "prodigy") else 4e-3)
    assert compose(["model=sft", f"optimizer={name}", "optimizer.lr=0.5"])[0].optimizer.lr == 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_checkpoint_to_the_bit(name, tmp_path):
    config = compose(["model=sft", "data=gsm8k", f"optimizer={name}"])[0].optimizer
    if name.endswith("pp"):
        config = OmegaConf.merge(config, {"eta_init": 0.01, "average": True})
    make = instantiate(config, _convert_="all")
    whole, first, second = Toy(make), Toy(make), Toy(make)
    fit(whole, tmp_path, val_check_interval=5)

    class Save(L.Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    fit(first, tmp_path, val_check_interval=5, callbacks=[Save()])
    trainer = fit(second, tmp_path, tmp_path / "five.ckpt", val_check_interval=5)
    assert (trainer.global_step, second.calls) == (10, whole.calls - 5 - 4 * (name == "mars_exact"))
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_a_multiplier_moves_with_the_learning_rate_and_the_schedule(tmp_path):
    rules = {"tables": {"roles": ["embedding"], "lr_mult": 0.1}, "rest": {"roles": ["matrix", "kernel", "vector"]}}
    trainer = fit(Toy(functools.partial(MARS, lr=0.2, groups=rules)), tmp_path)
    assert {g["group"]: pytest.approx(g["lr"]) for g in trainer.optimizers[0].param_groups} == {
        "tables": 0.02,
        "rest": 0.2,
    }


# Looking back


def test_the_exact_variant_under_lightning_is_the_loop_by_hand(tmp_path):
    method = Toy(functools.partial(MARS, lr=0.01, exact=True))
    by_hand = copy.deepcopy(method)
    trainer = fit(method, tmp_path)
    assert (method.calls, trainer.global_step) == (19, 10)

    optimizer = MARS([{"params": g["params"]} for g in by_hand.parameter_groups()], lr=0.01, exact=True)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    by_hand.train()
    for step, ids in enumerate(batches()):
        torch.manual_seed(step)

        def closure(ids=ids):
            running = [b.clone() for b in by_hand.buffers()]
            optimizer.zero_grad()
            (by_hand.head(by_hand.net(by_hand.table(ids).mT).mean(-1)) - 1).square().mean().backward()
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            if optimizer.looking_back:
                for buffer, before in zip(by_hand.buffers(), running):
                    buffer.copy_(before)

        optimizer.step(closure)
    for (name, ours), theirs in zip(method.state_dict().items(), by_hand.state_dict().values()):
        assert torch.equal(ours, theirs), name


# Gradients that are not finite


def test_a_gradient_that_is_not_finite_stops_with_step_parameter_and_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000003.ckpt").touch()
    with pytest.raises(FloatingPointError, match=r"model is nan at step 4, first in table\.weight.*step-000003\.ckpt"):
        fit(Toy(functools.partial(MARS, lr=0.01), break_at=4), tmp_path)


@pytest.mark.parametrize("exact", [False, True])
def test_a_gradient_that_is_not_finite_may_be_skipped_and_counted(tmp_path, exact):
    method = Toy(functools.partial(MARS, lr=0.01, exact=exact), break_at=4)
    method.on_nonfinite = "skip"
    with pytest.warns(UserWarning, match=r"gradient of model is nan at step 4, which is skipped"):
        trainer = fit(method, tmp_path)
    assert trainer.global_step == 10
    assert trainer.callback_metrics["train/skipped"] == 1
    assert all(torch.isfinite(p).all() for p in method.parameters())


# Other points than the last iterate


def test_validation_and_the_end_of_training_see_the_mean_of_the_iterates(tmp_path):
    method = Toy(functools.partial(AdaGradPP, eta_init=0.1, average=True))
    trainer = fit(method, tmp_path, val_check_interval=5)
    optimizer = trainer.optimizers[0]
    assert torch.equal(method.seen[-1], method.head.weight)
    assert trainer.callback_metrics["optimizer/eta"] > 0.1
    optimizer.train()
    assert not torch.equal(method.seen[-1], method.head.weight)
