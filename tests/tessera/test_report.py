"""The table and the card say what was measured, on what, and how to get it again."""

import csv
import json
import math
import shlex
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.alignment.policy_method import PolicyMethod
from lightning_modules.method import Method
from tessera import report
from tessera.folder import RunFolder

WORDS = ["model=dqo", "data.standin={sft: 64, val: 4}", "output=my runs"]


def metrics(greedy: float, stage: str = "test-standin", **more: float) -> dict[str, float]:
    named = {"greedy": greedy, "greedy_low": greedy - 0.1, "greedy_high": greedy + 0.1, "sampled": 0.125, **more}
    return {f"{stage}/{name}": value for name, value in named.items()}


@pytest.fixture
def run(tmp_path):
    """`run("dqo", metrics)` is a folder with the results of a run."""

    def run(model: str, metrics: dict[str, float], standin: bool = True) -> RunFolder:
        folder = RunFolder(tmp_path / model)
        folder.path.mkdir()
        method = Method(optimizer=torch.optim.SGD, scheduler=lambda step, total: 1.0)
        method.headline, method.standin = ("val/greedy", "max"), standin
        method.columns, method.caption = PolicyMethod.columns, PolicyMethod.caption
        data = SimpleNamespace(name="gsm8k-standin" if standin else "gsm8k", source=SimpleNamespace(origin="generated"))
        config = SimpleNamespace(seed=7, policy_weights=None)
        plan = SimpleNamespace(name=model, data=data, words=WORDS, config=config, start=None)
        report.write_results(folder, plan, method, metrics, seconds=12.34)
        return folder

    return run


def test_results_name_the_headline_its_direction_and_the_data(run):
    results = run("dqo", metrics(0.5)).results
    assert results["headline"] == {"metric": "test-standin/greedy", "direction": "max", "value": 0.5}
    assert results["data"] == {"name": "gsm8k-standin", "standin": True, "source": "generated"}
    assert results["seed"] == 7
    assert results["seconds"] == 12.3
    assert {"python", "torch", "lightning"} <= set(results["versions"])


def test_the_headline_of_a_run_that_was_not_tested_is_its_validation(run):
    results = run("dqo", metrics(0.25, stage="val"), standin=False).results
    assert results["headline"]["value"] == 0.25


def test_the_command_can_be_pasted_into_a_shell(run):
    command = run("dqo", metrics(0.5)).results["command"]
    assert shlex.split(command) == ["python", "train.py", *WORDS]


def test_the_table_has_a_row_for_every_run_in_per_cent_with_intervals(run, capsys):
    rows = {"SFT (start)": run("sft", metrics(0.25)), "DQO": run("dqo", metrics(0.5, auc=0.75))}
    report.finish(rows["DQO"], rows)
    printed = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert "25.0 [15.0, 35.0]" in lines["SFT (start)"]
    assert "50.0 [40.0, 60.0]" in lines["DQO"]
    assert "75.0" in lines["DQO"]
    assert "auc" in printed
    assert "_low" not in printed


def test_a_stand_in_is_never_silent(run, capsys):
    folder = run("dqo", metrics(0.5))
    report.finish(folder, {"DQO": folder})
    assert "The data is a stand-in" in capsys.readouterr().out
    assert "The data is a stand-in" in (folder.path / "README.md").read_text()


def test_real_data_is_not_called_a_stand_in(run, capsys):
    folder = run("dqo", metrics(0.5, stage="test"), standin=False)
    report.finish(folder, {"DQO": folder})
    assert "stand-in" not in capsys.readouterr().out + (folder.path / "README.md").read_text()


def test_the_card_holds_table_command_versions_and_figures(run, tmp_path):
    folder = run("dqo", metrics(0.5))
    (folder.path / "figures").mkdir()
    (folder.path / "figures" / "rewards.png").write_bytes(b"")
    report.write_card(folder, {"DQO": folder})
    card = (folder.path / "README.md").read_text()
    assert card.startswith("# dqo on gsm8k-standin\n")
    assert "| DQO | 50.0 [40.0, 60.0] |" in card
    assert "![rewards](figures/rewards.png)" in card
    assert folder.results["command"] in card
    header, rule, *body = [line for line in card.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (rule, *body)} == {header.count("|")}


def test_learning_curves_show_what_was_logged(tmp_path):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "train/loss", "val/greedy", "grad_norm/policy", "test/greedy"])
        rows.writerows([[9, 1.0, "", 0.5, ""], [19, 0.5, 0.25, 0.4, ""], [20, "", "", "", 0.3]])
    figure = report.learning_curves(tmp_path / "metrics.csv")
    lines = {line.get_label(): line.get_xydata().tolist() for axis in figure.axes for line in axis.lines}
    assert lines == {
        "train/loss": [[9, 1.0], [19, 0.5]],
        "val/greedy": [[19, 0.25]],
        "grad_norm/policy": [[9, 0.5], [19, 0.4]],
    }


@pytest.mark.parametrize("text", [None, "step\n", "step,train/loss\n", "step,train/loss,val/greedy\n3,1.0,\n"])
def test_learning_curves_of_little_or_nothing_are_no_trouble(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    report.learning_curves(tmp_path / "metrics.csv")


def test_results_that_are_not_finite_are_written_as_they_are(run):
    folder = run("dqo", metrics(math.nan))
    assert math.isnan(folder.results["headline"]["value"])
    assert "nan" in (folder.path / "README.md").read_text()


def test_a_figure_appears_whole(tmp_path):
    figure = SimpleNamespace(savefig=lambda path, **_: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.save_figure(figure, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_outside_of_git_there_is_no_commit(monkeypatch):
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError("no git")))
    assert report.git_commit() is None


def test_results_are_plain_json(run):
    path = run("dqo", metrics(0.5)).path / "results.json"
    assert json.loads(path.read_text())["model"] == "dqo"
