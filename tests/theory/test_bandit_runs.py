"""Bandits through the command line: what a run leaves, axes by words, refusals, the same bytes after a kill."""

import csv
import json

import pytest
from omegaconf import OmegaConf

from tessera.compose import CONF, compose
from tessera.words import phase, problems
from tests.theory.runs import check_that_a_killed_run_ends_with_the_same_bytes, run_folder

ROOM = ("kl_", "f_cb", "two_stage")
SMALL = ("data=bandit", "compare=null", "model.copies=3", "trainer.enable_progress_bar=false")


FAST = [
    (("model=kl_ucb", "data.rounds=64", "model.fit_from=8"), {"per_doubling", "predicted", "slope"}),
    (("model=two_stage", "feedback=preference", "data.rounds=512", "model.fit_from=64"), {"slope", "n_gap"}),
]
SLOW = [
    (("model=kl_lsvi_ucb", "data.rounds=32", "model.fit_from=4"), {"per_doubling", "predicted", "slope"}),
    (("model=kl_pcb", "data.rounds=4096"), {"slope", "n_gap", "predicted"}),
    (("model=kl_pcdb", "data.rounds=4096"), {"slope", "n_gap", "predicted"}),
    (("model=f_cb", "data.rounds=4096"), {"slope", "n_gap", "predicted"}),
    (("model=two_stage", "data.rounds=4096", "model.fit_from=512"), {"slope", "n_gap", "predicted"}),
]


@pytest.mark.parametrize(
    ("words", "expected"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_method_runs_on_a_bandit_and_leaves_slopes_with_intervals(say, tmp_path, words, expected):
    status, said = say(*SMALL, *words)
    assert status == 0, said
    folder = run_folder(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert expected <= set(results["table"])
    low, value, high = (results["metrics"][f"test/slope{end}"] for end in ("_low", "", "_high"))
    assert low < value < high
    assert results["headline"]["value"] > 0
    assert len(list((folder / "figures").glob("*.png"))) == 1
    rows = list(csv.DictReader((folder / "export" / "curves.csv").open()))
    assert [int(next(iter(row.values()))) for row in rows[:4]] == [1, 2, 4, 8]
    (measured,) = {"regret", "gap"} & set(rows[0])
    assert all(float(row[f"{measured}_low"]) <= float(row[f"{measured}_high"]) for row in rows)


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem.startswith(ROOM))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "kl_ucb_minimax" else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_no_two_rows_of_an_experiment_are_the_same_run_and_a_plug_in_has_no_bonus(name):
    """What an experiment sets holds for its controls too, and would make one of them the method itself."""
    words = [f"experiment={name}"]
    main = compose(words)[0]
    rows = {main.label: main} | {label: compose(phase(list(own), words))[0] for label, own in main.compare.items()}
    runs = [
        "".join(OmegaConf.to_yaml(part, resolve=True) for part in (row.model, row.data.instance))
        for row in rows.values()
    ]
    assert len(set(runs)) == len(rows)
    assert all(row.model.bonus.c == 0 for label, row in rows.items() if "plug-in" in label)


@pytest.mark.slow
def test_instances_bonuses_decisions_and_divergences_combine(say, tmp_path):
    """One word each: whatever is an axis here can be put beside any choice of another."""
    for words in (
        ("model=kl_ucb", "instance=linear", "bonus=theory"),
        ("model=kl_ucb", "instance=minimax", "decision=greedy", "data.instance.horizons=[64,128,256]"),
        ("model=kl_ucb", "regularizer=chi_square", "bonus=none"),
        ("model=kl_lsvi_ucb", "instance=uniform", "bonus=theory"),
        ("model=kl_pcb", "instance=linear", "data.instance.contexts=5", "bonus=theory"),
        ("model=kl_pcdb", "instance=covered", "bonus=theory", "decision=uniform"),
        ("model=f_cb", "instance=answers", "decision=oracle"),
        ("model=two_stage", "regularizer=chi_square", "instance=tail"),
        ("model=preference_bandit", "data=preference_bandit", "data.rounds=2"),
    ):
        status, said = say(*SMALL, "data.rounds=256", *words)
        assert status == 0, (words, said)


def test_what_does_not_fit_is_refused_before_anything_heavy():
    for words, reason in (
        (
            ("model=kl_pcb", "data=gsm8k"),
            "does not fit the other words: conf/instance/ is for data=bandit",
        ),
        (("model=kl_ucb", "bonus=large"), "bonus=large: there is no such bonus"),
        (("model=kl_pcb", "instance=file"), "data.instance.path needs a value"),
        (("model=kl_ucb", "bonus=theory", "model.bonus.c=1"), "there is no key model.bonus.c"),
    ):
        assert reason in " ".join(problems(list(words))), words


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("model=two_stage", "data.instance.p=null", "data.instance.coverage=500.0"), "coverage=500 is infeasible"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (("model=kl_ucb", "data=gsm8k"), "model=kl_ucb eats RoundBatch, and data=gsm8k serves"),
                (("model=kl_ucb", "data=rps2"), "data=rps2 is no bandit"),
                (("model=kl_ucb", "instance=mdp"), "is no bandit"),
                (("model=kl_lsvi_ucb", "instance=tail", "data.instance.rare=0.5"), "less than half"),
                (("model=kl_ucb", "model.bonus.c=-1.0"), "a bonus must not be negative"),
                (("model=kl_ucb", "model.eta=0.0"), "model.eta=0.0 must be positive"),
                (("model=kl_pcb", "instance=file", "data.instance.path=no.npz"), "no.npz does not exist"),
                (("model=kl_pcb", "instance=two_arm", "data.log=no.csv"), "data.log=no.csv does not exist"),
                (("model=kl_pcb", "instance=linear"), "no bandit with fixed contexts"),
            )
        ),
    ],
)
def test_what_makes_no_problem_is_refused_in_a_sentence(say, words, reason):
    status, said = say(*words)
    assert status == 1
    assert reason in said


@pytest.mark.slow
def test_a_killed_bandit_goes_on_to_the_same_bytes(tmp_path):
    job = ("model=kl_ucb", "data=bandit", "compare=null", "model.copies=20", "callbacks.checkpoint_every=10")
    check_that_a_killed_run_ends_with_the_same_bytes(tmp_path, job, "step-000[0-9][3-9]*.ckpt")
