"""One run prepares another, and nothing is computed twice."""

from pathlib import Path

import pytest

from tessera.run import main

TINY = (
    *("data=gsm8k", "data.standin={sft: 64, prompts: 8, val: 4, test: 4, misconception: 0.6, slip: 0.0}"),
    *("policy.width=16", "policy.layers=1", "policy.heads=2", "policy.hidden=32", "data.extract=flexible"),
    *("data.batch_size=8", "data.max_response=64", "rollouts.k=2", "evaluation.k=1", "compare=null"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2"),
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run("model=sft", ...)` carries out the words and returns the folders of all runs so far."""
    monkeypatch.delenv("TESSERA_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*words: str) -> list[Path]:
        assert main([*TINY, f"output={tmp_path}", *words]) == 0
        return sorted(path.parent for path in tmp_path.glob("*/*/*/results.json"))

    return run


def weights(folder: Path) -> bytes:
    return (folder / "export" / "model.safetensors").read_bytes()


def test_a_method_begins_with_the_weights_of_the_run_that_prepares_it(run):
    dqo, sft = run("model=dqo", "model.value_warmup=1.0")  # in which the policy never moves
    assert (dqo.parts[-3], sft.parts[-3]) == ("dqo", "sft")
    assert weights(dqo) == weights(sft)


def test_words_that_were_carried_out_are_answered_from_their_folder(run, capsys):
    (first,) = run("model=sft")
    written = (first / "results.json").stat().st_mtime_ns
    assert run("model=sft", "logger=csv", "callbacks.keep=1") == [first]
    assert (first / "results.json").stat().st_mtime_ns == written
    assert f"sft on gsm8k-standin was done before, in {first}" in capsys.readouterr().out


def test_resume_never_trains_anew_to_the_same_result(run):
    run("model=sft")
    first, second = run("model=sft", "resume=never")
    assert weights(first) == weights(second)


def test_methods_share_the_run_that_prepares_them(run):
    run("model=dqo")
    assert [folder.parts[-3] for folder in run("model=kto", "optimizer.lr=1e-4")] == ["dqo", "kto", "sft"]


def test_a_changed_word_of_the_shared_ones_prepares_anew(run):
    run("model=sft")
    assert [folder.parts[-3] for folder in run("model=dqo", "seed=2")] == ["dqo", "sft", "sft"]


def test_exported_weights_are_a_start_without_a_run_that_prepares(run):
    (sft,) = run("model=sft")
    dqo, *others = run("model=dqo", "model.value_warmup=1.0", f"policy_weights={sft / 'export'}", "seed=2")
    assert others == [sft]
    assert weights(dqo) == weights(sft)


def test_rft_without_a_right_answer_still_imitates_the_given_solutions_when_asked_to(run, capsys):
    words = ("model=rft", "data.max_response=80")  # the smallest policy is never right
    with pytest.raises(ValueError, match="no sampled answer is correct"):
        run(*words)
    rft, _ = run(*words, "model.solutions=true")
    assert rft.parts[-3] == "rft"
