"""The language model through the platform: it learns, survives kills, and is the same on any number of processes."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from datamodules.shards import Stream, write_nanogpt
from tests.waiting import until

TINY = (
    *("model=gpt2", "data=text", "data.context=16", "data.batch_size=8", "data.limit=64"),
    # without biases: the keys' has no gradient but rounding, of which Adam makes whole steps
    *("model.network.layers=1", "model.network.heads=2", "model.network.width=16", "model.network.bias=false"),
    *("trainer.max_steps=24", "trainer.val_check_interval=8"),
    *("trainer.log_every_n_steps=1", "scheduler.warmup=2", "callbacks.checkpoint_every=3"),
    "model.samples={count: 2, prompt_tokens: 4, max_new: 8, temperature: 1.0, top_k: null}",
)
TWO = ("trainer.accelerator=cpu", "trainer.devices=2")


def start(output: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, train.__file__, *TINY, *words, f"output={output}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def carried_out(output: Path, *words: str) -> Path:
    """The folder of a finished run."""
    process = start(output, *words)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (results,) = output.glob("gpt2/*/*/results.json")
    return results.parent


def killed(output: Path, step: int, *words: str) -> None:
    """A run that is killed once it has a checkpoint of that step."""
    process = start(output, *words)
    until(lambda: list(output.glob(f"gpt2/*/*/checkpoints/step-{step:06d}.ckpt")) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(output.glob("gpt2/*/*/results.json")), "the run was over before it could be killed"


def column(run: Path, name: str = "train/loss") -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def weights(run: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_file(run / "export" / "model.safetensors").values()])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return carried_out(tmp_path_factory.mktemp("alone"))


def test_it_learns_and_leaves_results_figures_and_text(alone):
    results = json.loads((alone / "results.json").read_text())
    losses = column(alone)
    assert len(losses) == 24
    assert losses[0] == pytest.approx(5.55, abs=0.15)  # ln 256
    assert losses[-1] < losses[0] - 1
    assert results["headline"]["metric"] == "test-standin/loss"
    assert results["metrics"]["test-standin/bits_per_byte"] == pytest.approx(results["headline"]["value"] / 0.693147)
    assert {path.name for path in (alone / "figures").glob("*.png")} == {"learning_curves.png", "loss_by_context.png"}
    samples = [json.loads(line) for line in (alone / "samples.jsonl").read_text().splitlines()]
    assert [sorted(sample) for sample in samples] == [["continuation", "prompt"]] * 2


def test_the_export_is_the_network_that_was_tested(alone):
    model = AutoModelForCausalLM.from_pretrained(alone / "export").eval()
    assert model.config.vocab_size == 256
    assert sum(p.numel() for p in model.parameters()) == weights(alone).numel()


def test_training_goes_on_from_the_export(alone, tmp_path):
    words = [word for word in TINY if not word.startswith("model.network.")]
    source = ["network@model.network=gpt2_pretrained", f"model.network.source={alone / 'export'}"]
    command = [sys.executable, train.__file__, *words, *source, "optimizer.lr=1e-5", f"output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("gpt2/*/*/results.json")
    assert column(results.parent)[0] == pytest.approx(column(alone)[-1], abs=0.3)


def test_validation_is_over_every_token_whatever_the_batches(alone, tmp_path):
    other = carried_out(tmp_path, "data.batch_size=8", "trainer.accumulate_grad_batches=4")
    assert column(other, "val-standin/loss") == pytest.approx(column(alone, "val-standin/loss"), abs=1e-6)


def test_killed_and_started_again_it_is_equal_to_the_byte(alone, tmp_path):
    killed(tmp_path, 12)
    again = carried_out(tmp_path)
    assert column(again) == column(alone)
    assert column(again, "test-standin/loss") == column(alone, "test-standin/loss")
    assert torch.equal(weights(again), weights(alone))


@pytest.mark.slow
def test_begun_on_two_sharded_processes_and_finished_on_one(alone, tmp_path):
    killed(tmp_path, 12, "trainer=fsdp", *TWO)
    again = carried_out(tmp_path)
    assert column(again) == pytest.approx(column(alone), abs=1e-6)
    torch.testing.assert_close(weights(again), weights(alone), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(strategy, alone, tmp_path):
    both = carried_out(tmp_path, f"trainer={strategy}", *TWO)
    assert column(both) == pytest.approx(column(alone), abs=1e-6)
    assert column(both, "val-standin/loss") == pytest.approx(column(alone, "val-standin/loss"), abs=1e-6)


def test_shards_written_from_text_are_read_back(tmp_path):
    text = b"to be or not to be, that is the question. " * 400
    for part in ("train", "val"):
        write_nanogpt(tmp_path / f"{part}.bin", Stream([np.frombuffer(text, np.uint8)]))
    run = carried_out(tmp_path / "out", f"data.path={tmp_path}", "data.tokenizer=bytes", "data.vocab_size=256")
    assert json.loads((run / "results.json").read_text())["data"]["standin"] is False
    losses = column(run)
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.slow
def test_a_grid_ends_with_a_comparison(tmp_path):
    words = ["-m", "seed=0,1", "optimizer=adamw,mars", "trainer.max_steps=8", f"hydra.sweep.dir={tmp_path / 'grid'}"]
    process = start(tmp_path / "out", *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    rows = [line.split()[1] for line in out.splitlines() if line.startswith("│ optimizer=")]
    assert sorted(rows) == ["optimizer=adamw", "optimizer=mars"]
    assert (tmp_path / "grid" / "comparison.png").exists()
