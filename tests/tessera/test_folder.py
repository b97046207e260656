"""A run is found again by what it computes, and done by one process at a time."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.compose import compose
from tessera.folder import RunFolder, fingerprint, held

INPUTS = {"data": "digest of the rows"}


def identity(*words: str, **inputs: str) -> str:
    return fingerprint(compose(["model=sft", *words])[0], {**INPUTS, **inputs})


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=1e-5"],
        ["seed=2"],
        ["model=rft"],
        ["trainer.max_steps=7"],
        ["data.batch_size=16"],
        ["callbacks.patience=3"],
        ["stages=[fit]"],
        ["policy.width=32"],
    ],
)
def test_what_changes_the_result_changes_the_fingerprint(words):
    assert identity(*words) != identity()


@pytest.mark.parametrize("name", ["data", "start", "checkpoint"])
def test_the_content_of_inputs_changes_the_fingerprint(name):
    assert identity(**{name: "another digest"}) != identity()


@pytest.mark.parametrize(
    "words",
    [
        ["output=elsewhere"],
        ["callbacks.checkpoint_every=1", "callbacks.keep=9"],
        ["logger=tensorboard"],
        ["debug=full"],
        ["resume=never"],
        ["record=folder.txt"],
        ["compare=null"],
        ["trainer.timeout_minutes=1"],
        ["model=rft", "model=sft"],
    ],
)
def test_what_does_not_change_the_result_does_not_change_the_fingerprint(words):
    assert identity(*words) == identity()


def test_a_changed_line_of_a_method_changes_the_fingerprint(monkeypatch):
    before = identity()
    monkeypatch.setattr("tessera.folder.source_digest", lambda: "another")
    assert identity() != before


def test_two_runs_of_the_same_second_get_two_folders(tmp_path):
    config = compose(["model=sft"])[0]
    made = {RunFolder.create(tmp_path, {"fingerprint": "a"}, config).path for _ in range(20)}
    assert len(made) == 20


def test_the_newest_run_with_that_fingerprint_is_found(tmp_path):
    for name, print_ in (("20260101-000000-aaaa", "a"), ("20260102-000000-0000", "a"), ("20260103-000000-aaaa", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(f'{{"fingerprint": "{print_}"}}')
    (tmp_path / "20260104-000000-aaaa").mkdir()
    assert RunFolder.latest(tmp_path, "a").path.name == "20260102-000000-0000"
    assert RunFolder.latest(tmp_path, "c") is None
    assert RunFolder.latest(tmp_path / "none", "a") is None


def test_a_run_that_fails_before_it_trains_leaves_nothing(tmp_path):
    folder = RunFolder.create(tmp_path, {}, compose(["model=sft"])[0])
    folder.give_up(ValueError("no"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_while_it_trains_leaves_the_traceback(tmp_path):
    folder = RunFolder.create(tmp_path, {}, compose(["model=sft"])[0])
    (folder.path / "metrics.csv").write_text("step\n")
    folder.give_up(ValueError("the loss is nan"))
    assert "ValueError: the loss is nan" in (folder.path / "error.log").read_text()


HOLD = """
import sys, time
from pathlib import Path
from tessera.folder import held
with held(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "one" * 8], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waiting = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "one" * 8],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert f"waiting for process {holder.pid} on " in waiting.stderr.readline()
    with held(tmp_path, "another run"):
        assert waiting.poll() is None
    holder.send_signal(signal.SIGKILL)
    assert waiting.stdout.readline() == "held\n"
    waiting.kill()
    for process in (holder, waiting):
        process.communicate()
    with held(tmp_path, "one" * 8):
        assert capsys.readouterr().err == ""


def test_the_folder_is_named_by_time_and_holds_the_configuration(tmp_path):
    folder = RunFolder.create(tmp_path / "sft", {"words": ["model=sft"]}, compose(["model=sft", "seed=5"])[0])
    assert folder.record == {"words": ["model=sft"]}
    assert folder.results is None
    assert "seed: 5" in Path(folder.path, "config.yaml").read_text()
