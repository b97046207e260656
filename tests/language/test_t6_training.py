"""T6 through the platform: every attention trains, on any number of processes as on one, and is read back."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from lightning_modules.language.t6 import ATTENTIONS, T6
from tests.language.compiled import compiles_whole_and_once

TINY = (
    *("model=t6", "data=text", "data.context=16", "data.batch_size=8", "data.limit=64"),
    *("model.network.layers=1", "model.network.width=16", "model.network.head_width=8", "model.network.orders=[4,2]"),
    *("trainer.max_steps=24", "trainer.val_check_interval=8", "trainer.log_every_n_steps=1", "scheduler.warmup=2"),
    "model.samples={count: 2, prompt_tokens: 4, max_new: 8, temperature: 1.0, top_k: null}",
)
SLOW = pytest.mark.slow
FAST_ONE = [word if word == "tpa" else pytest.param(word, marks=SLOW) for word in ATTENTIONS]


def carried_out(output: Path, *words: str) -> Path:
    """The folder of a finished run."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, train.__file__, *TINY, *words, f"output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    (results,) = output.glob("t6/*/*/results.json")
    return results.parent


def column(run: Path, name: str = "train/loss") -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(run: Path) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(T6.load(run / "export").parameters())


@pytest.mark.slow
def test_two_sharded_processes_are_one_and_both_leave_the_network(tmp_path):
    words = ("optimizer=mars", "optimizer.lr=3e-3")
    one = carried_out(tmp_path / "one", *words)
    two = carried_out(tmp_path / "two", *words, "trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu")
    losses = column(one)
    assert len(losses) == 24
    assert losses[-1] < losses[0] - 0.5
    assert column(two) == pytest.approx(losses, abs=1e-5)
    assert column(two, "val-standin/loss") == pytest.approx(column(one, "val-standin/loss"), abs=1e-5)
    torch.testing.assert_close(weights(two), weights(one), atol=1e-4, rtol=0)
    results = json.loads((one / "results.json").read_text())
    assert "T6.load" in results["leaves"]
    assert results["metrics"]["test-standin/cache_bytes"] == 2 * (2 + 2) * (6 + 8)
    assert len((one / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("attention", FAST_ONE)
def test_the_network_compiles_whole_and_once(attention):
    assert compiles_whole_and_once("t6", attention=attention)


@SLOW
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_trains(attention, tmp_path):
    losses = column(carried_out(tmp_path, f"model.network.attention={attention}"))
    assert losses[-1] < losses[0] - 0.5


@SLOW
@pytest.mark.parametrize("attention", ["gqa", "mla", "tpa_noncontextual_a", "tpa_noncontextual_b"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(strategy, attention, tmp_path):
    word = f"model.network.attention={attention}"
    one = carried_out(tmp_path / "one", word)
    two = carried_out(tmp_path / "two", word, f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu")
    assert column(two) == pytest.approx(column(one), abs=1e-5)


@SLOW
def test_the_zoo_ends_with_losses_and_costs_side_by_side(tmp_path):
    choices = "model.network.attention=mha,tpa", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'grid'}"
    shorter = [word for word in TINY if not word.startswith(("model=", "data="))]
    command = [sys.executable, train.__file__, "-m", "experiment=attention_zoo", *shorter, *choices]
    done = subprocess.run([*command, f"output={tmp_path}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines() if line.startswith("│ model.network")]
    bytes_of_a_token = {row[0].rpartition("=")[2]: row[-1] for row in rows}
    assert bytes_of_a_token == {"mha": str(2 * 2 * 4 * 8), "tpa": str(2 * (2 + 2) * (6 + 8))}
