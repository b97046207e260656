"""Whatever is wrong with what a user gives: one sentence that names it, exit code 1, nothing half-written."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import command, without_data

GOOD = [{"question": f"Tom has {n} pens and buys 2. How many?", "answer": f"{n} + 2\n#### {n + 2}"} for n in range(12)]


def written(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(status: int, err: str) -> str:
    """The one sentence of a refusal."""
    spoken = [line for line in err.splitlines() if line and not line.startswith("warning: ")]
    assert status == 1, err
    assert len(spoken) == 1, err
    assert spoken[0].startswith("error: ")
    return spoken[0].removeprefix("error: ")


def files(folder: Path) -> list[str]:
    """What a run has left, but for the locks and folders."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.endswith("lock"))


@pytest.fixture
def refused(say, outputs):
    """`refused("model=sft", ...)` is the sentence with which these words are refused, without a trace on the disk."""

    def refused(*words: str) -> str:
        before = files(outputs)
        reason = sentence(*say(*words))
        assert files(outputs) == before
        return reason

    return refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of two steps: its folder."""
    output = tmp_path_factory.mktemp("finished")
    words = command("model=sft", f"output={output}", "callbacks.checkpoint_every=1")
    subprocess.run(words, env=without_data(), capture_output=True, check=True)
    return next(output.glob("sft/*/*/results.json")).parent


class Bomb:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


# ---- data


BROKEN = {
    "an empty file": (b"", "is empty"),
    "a truncated line": (json.dumps(GOOD[0]).encode() + b'\n{"question": "How', "line 2: invalid JSON"),
    "bytes that are not UTF-8": (b'{"question": "caf\xe9?", "answer": "#### 1"}\n', "not UTF-8"),
    "a row without an answer": (b'{"question": "How many?"}\n', "line 1: field `answer` is missing"),
    "an answer without its mark": (
        b'{"question": "How many?", "answer": "5"}\n',
        "line 1: field `answer` has no `####`",
    ),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>\n", "looks like an HTML page"),
    "two rows of one id": (
        b'{"id": "7", "question": "a?", "answer": "#### 1"}\n{"id": "7", "question": "b?", "answer": "#### 1"}\n',
        "line 2: field `id` repeats",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_data_file_is_refused_by_name_and_line(broken, refused, tmp_path):
    content, reason = BROKEN[broken]
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    said = refused("model=sft", f"data.path={tmp_path}")
    assert str(path) in said
    assert reason in said


def test_a_missing_data_path_is_refused_by_its_key(refused, tmp_path):
    assert f"data.path={tmp_path}/none: there is no such file or folder" in refused(
        "model=sft", f"data.path={tmp_path}/none"
    )


def test_bad_data_of_the_main_run_is_found_before_the_run_that_prepares_it(refused, tmp_path):
    written(tmp_path / "data" / "train.jsonl", [*GOOD, {"question": "?"}])
    assert "line 13" in refused("model=dqo", f"data.path={tmp_path / 'data'}", "data.val_size=4")


def test_a_prompt_and_response_longer_than_the_context_are_refused(refused):
    said = refused("model=sft", "policy.context=256", "data.max_prompt=200", "data.max_response=64")
    assert "data.max_prompt=200" in said
    assert "data.max_response=64" in said
    assert "256" in said


def test_a_test_problem_longer_than_the_prompt_is_refused(refused, tmp_path):
    written(tmp_path / "data" / "train.jsonl", GOOD)
    written(tmp_path / "data" / "test.jsonl", [{"question": "Why? " * 80, "answer": "#### 3"}])
    said = refused("model=sft", f"data.path={tmp_path / 'data'}", "data.val_size=4", "data.max_prompt=100")
    assert "test-0" in said
    assert "data.max_prompt=100" in said
    assert "data.on_error=skip" in said


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("", "field `reward` is missing"),
        (', "reward": null', "field `reward` is missing"),
        (', "reward": NaN', "NaN is not JSON"),
        (', "reward": 1e999', "overflows"),
        (', "reward": "good"', "field `reward` must be float"),
    ],
)
def test_a_trajectory_without_a_finite_reward_is_refused(refused, tmp_path, reward, reason):
    path = tmp_path / "answers.jsonl"
    good, bad = '{"question": "a?", "response": "1", "reward": 1}', '{"question": "b?", "response": "2"' + reward + "}"
    path.write_text(f"{good}\n{bad}\n")
    said = refused("model=dqo", f"data.trajectories={path}")
    assert f"{path}, line 2: " in said
    assert reason in said


# ---- checkpoints


def test_a_checkpoint_of_another_model_is_refused(refused, finished):
    checkpoint = finished / "checkpoints" / "step-000002.ckpt"
    said = refused("model=sft", "policy.width=32", f"ckpt_path={checkpoint}")
    assert f"{checkpoint} is a checkpoint of another model" in said
    assert re.search(r"\(\d+, 16\) there and \(\d+, 32\) here", said)


def test_a_checkpoint_of_another_method_is_refused(refused, finished):
    said = refused(
        "model=dqo", f"ckpt_path={finished / 'checkpoints' / 'best.ckpt'}", f"policy_weights={finished / 'export'}"
    )
    assert "is a checkpoint of another model" in said
    assert "absent there" in said


def test_a_pickle_bomb_does_not_go_off(refused, tmp_path):
    target = tmp_path / "touched"
    torch.save({"state_dict": {}, "global_step": 3, "bomb": Bomb(target)}, tmp_path / "bomb.ckpt")
    torch.load(tmp_path / "bomb.ckpt", weights_only=False)
    assert target.exists(), "the bomb is none"
    target.unlink()
    said = refused("model=dqo", f"ckpt_path={tmp_path / 'bomb.ckpt'}")
    assert not target.exists()
    assert f"{tmp_path / 'bomb.ckpt'} is not a checkpoint of tensors and plain values" in said


def test_a_run_folder_of_other_words_is_not_continued(say, finished, outputs):
    shutil.copytree(finished.parents[2], outputs)
    folder = next(outputs.glob("sft/*/*/run.json")).parent
    said = sentence(*say("model=sft", "trainer.max_steps=3", f"resume={folder}"))
    assert f"resume={folder} is another run (trainer.max_steps is 2 there and 3 here)" in said


@pytest.mark.parametrize("content", [b"", b"step: 3\n", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused(refused, tmp_path, content):
    (tmp_path / "some.ckpt").write_bytes(content)
    assert "is not a checkpoint" in refused("model=sft", f"ckpt_path={tmp_path / 'some.ckpt'}")


def test_tensors_that_are_no_checkpoint_are_refused(refused, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "some.ckpt")
    assert "holds no state_dict" in refused("model=sft", f"ckpt_path={tmp_path / 'some.ckpt'}")


def test_a_checkpoint_is_evaluated_even_where_its_run_has_ended(say, finished, outputs):
    shutil.copytree(finished.parents[2], outputs)
    status, err = say("model=sft", "stages=[test]", f"ckpt_path={finished / 'checkpoints' / 'step-000001.ckpt'}")
    assert status == 0, err
    assert len(list(outputs.glob("sft/*/*/results.json"))) == 2


def test_a_folder_without_weights_is_no_start(refused, tmp_path):
    assert "holds no *.safetensors" in refused("model=dqo", f"policy_weights={tmp_path}")


# ---- words


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["trainer.max_stepz=3"], "did you mean trainer.max_steps"),
        (["model=dqq"], "did you mean dqo"),
        (["stages=[fit,fly]"], "stages=fly: there are fit, validate, test, predict"),
        (["resume=/tmp"], "resume=/tmp is no run folder"),
        (["data.process_reward=some"], "data.process_reward=some: there are none, annotation, mc"),
        (["data.batch_size=0"], "data.batch_size=0 must be positive"),
        (["data.standin.tset=3"], "did you mean data.standin.test"),
        (["trainer.max_steps=-1"], "trainer.max_steps and trainer.max_epochs are both unlimited"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed: float16 needs a GPU"),
        (["trainer.strategy=deepspeed"], "trainer.strategy=deepspeed: there are auto, ddp, fsdp, ddp_fsdp"),
        (["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1"], "shards over several processes"),
        (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3"], "data.batch_size=8 cannot be dealt out to 3"),
        (["trainer.accumulate_grad_batches=3"], "data.batch_size=8 cannot be dealt out to 3"),
        (["model._target_=tests.faults.toys.Folding"], "eats BackboneBatch, and data=gsm8k serves TokenBatch"),
        (["model=sft", "model._target_=tests.faults.toys.Frozen"], "Frozen has nothing to train"),
        (["data.limit=0"], "data.limit=0 must be positive"),
        (["callbacks.checkpoint_every=0"], "callbacks.checkpoint_every=0 must be positive"),
        (["trainer.devices=some"], "trainer.devices=some: expected a number of processes, or auto"),
        (["trainer.max_steps=2.5"], "trainer.max_steps=2.5: expected a whole number"),
        (["model.objective=dro"], "objective@model.objective=dro takes another file of conf/objective/"),
        (["data.standin=none"], "data.standin is a group of keys; change one of data.standin.sft"),
        (["objective=dro"], "Did you mean to override objective@model.objective?"),
        (["model.value=both"], "model.value=both: use separate or shared"),
        (["model=sft", "data.max_response=5"], "there is no row to train on"),
        (
            ["model=sppo", "trainer.max_steps=4"],
            "is no multiple of model.iterations=3: every iteration has as many steps, so",
        ),
    ],
)
def test_words_that_do_not_fit_are_refused(refused, words, reason):
    assert reason in refused("model=dqo", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused(refused):
    said = refused("model=sft", "trainer=gpu")
    assert "trainer.accelerator=gpu: there is no GPU here; trainer=cpu runs without" in said


def test_all_that_does_not_fit_is_said_at_once(say):
    status, err = say("model=sft", "trainer.precision=16-mixed", "trainer.max_steps=-1", "data.batch_size=0")
    assert status == 1
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error"] * 3


def test_what_does_not_fit_in_a_compared_run_is_refused_at_the_start(refused):
    assert "data.batch_size=8" in refused(
        "model=dqo", "compare={RFT: ['model=rft', 'trainer.accumulate_grad_batches=3']}"
    )


def test_an_output_that_cannot_be_written_is_named(say):
    assert "/proc/outputs" in sentence(*say("model=sft", "output=/proc/outputs"))


def test_the_traceback_is_shown_when_asked_for(say, tmp_path):
    status, err = say("model=sft", "debug=full", f"data.path={written(tmp_path / 'train.jsonl', [{'question': '?'}])}")
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")


# ---- and as a process of its own


def test_a_process_that_is_refused_exits_with_status_one(tmp_path):
    target, path = tmp_path / "touched", tmp_path / "bomb.ckpt"
    torch.save({"bomb": Bomb(target)}, path)
    data = written(tmp_path / "train.jsonl", [*GOOD, {"question": "?"}])
    running = [
        subprocess.Popen(
            command("model=dqo", f"output={tmp_path / 'outputs'}", *words),
            stderr=subprocess.PIPE,
            text=True,
            env=without_data(),
        )
        for words in ([f"ckpt_path={path}"], [f"data.path={data}"], ["modle=dqo"])
    ]
    said = [sentence(process.wait(), process.stderr.read()) for process in running]
    assert f"{path} is not a checkpoint" in said[0]
    assert f"{data}, line 13" in said[1]
    assert "did you mean model" in said[2]
    assert not target.exists()
    assert not (tmp_path / "outputs").exists()
