"""W&B's sweep files are read as W&B reads them, and what cannot be read is refused with the key to change."""

import json
import math
import os
import random
import shlex
import subprocess
import sys

import pytest
import yaml

from tools.sweep_format import TRAIN, macros, read

pytest_plugins = ["tests.tools.places"]
DUMP = "import json, os, sys\njson.dump([sys.executable, *sys.argv], open(os.environ['DUMP'], 'w'))\n"


def axis(place, **settings):
    """The one parameter of a sweep."""
    return read(place.write(parameters={"x": settings})).parameters[0]


def draws(parameter, number: int = 400) -> list:
    generator = random.Random(1)
    return [parameter.spoken(parameter.draw(generator)) for _ in range(number)]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"min": 1, "max": 3}, int), ({"min": 1.0, "max": 3.0}, float), ({"min": 1, "max": 3.0}, float)],
)
def test_without_a_distribution_whole_ends_mean_whole_numbers(place, settings, kind):
    values = draws(axis(place, **settings))
    assert {type(value) for value in values} == {kind}
    assert 1 <= min(values) < 1.1
    assert 2.9 < max(values) <= 3


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("log_uniform_values", (1e-4, 1e-1)),
        ("inv_log_uniform_values", (1e-4, 1e-1)),
        ("log_uniform", (math.log(1e-4), math.log(1e-1))),
        ("inv_log_uniform", (math.log(1e1), math.log(1e4))),
    ],
)
def test_logarithmic_distributions_have_as_many_values_in_every_decade(place, kind, ends):
    values = draws(axis(place, distribution=kind, min=ends[0], max=ends[1]), 3000)
    decades = [sum(10**-n / 10 <= value < 10**-n for value in values) for n in (1, 2, 3)]
    assert sum(decades) == 3000
    assert all(abs(count - 1000) < 120 for count in decades)


@pytest.mark.parametrize(
    ("settings", "among"),
    [
        ({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25}, {0.0, 0.25, 0.5, 0.75, 1.0}),
        ({"distribution": "q_log_uniform_values", "min": 16, "max": 64, "q": 16}, {16, 32, 48, 64}),
        ({"distribution": "q_log_uniform", "min": 0.1, "max": 1.3}, {1, 2, 3, 4}),
        ({"values": ["a", None, True, 2, 2.5, [1]]}, {"a", None, True, 2, 2.5, (1,)}),
        ({"distribution": "constant", "value": 3}, {3}),
    ],
)
def test_steps_and_choices_keep_their_values_and_types(place, settings, among):
    values = [tuple(value) if isinstance(value, list) else value for value in draws(axis(place, **settings))]
    assert {(type(value), value) for value in values} == {(type(value), value) for value in among}


def test_random_search_draws_choices_with_their_probabilities(place):
    values = draws(axis(place, values=["a", "b"], probabilities=[0.9, 0.1]), 1000)
    assert 860 < values.count("a") < 940


def test_a_random_point_is_a_function_of_the_file_and_the_number(place):
    sweep = read(place.write())
    points = [sweep.point(number)["x"] for number in range(50)]
    assert points == [read(place.path / "sweep.yaml").point(number)["x"] for number in range(50)]
    assert len(set(points)) == 50


def test_nested_parameters_are_handed_on_as_w_and_b_nests_them(place):
    sweep = read(place.write(parameters={"x": {"value": 1}, "opt": {"parameters": {"lr": {"values": [0.1]}}}}))
    assert [parameter.name for parameter in sweep.parameters] == ["x", "opt.lr"]
    assert sweep.arguments({}) == {"x": 1, "opt": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metod": "grid"}, "metod is not a key that is read here; did you mean method?"),
        ({"method": "hyperopt"}, "method is hyperopt; there are grid, random, bayes"),
        ({"method": None}, "method is missing; there are grid, random, bayes"),
        ({"metric": None}, "metric is missing; write metric: {name: ..., goal: maximize}"),
        ({"metric": {"goal": "maximize"}}, "metric.name is None; give the name of a column"),
        ({"metric": {"name": "loss", "goal": "up"}}, "metric.goal is up; there are minimize, maximize"),
        ({"metric": {"name": "loss", "gaol": "minimize"}}, "metric.gaol is not a key that is read here; did you mean"),
        ({"parameters": None}, "parameters is empty; name at least one"),
        ({"parameters": {}}, "parameters is empty; name at least one"),
        ({"parameters": {"x": 3}}, "parameters.x is 3; write {value: 3}"),
        ({"parameters": {"x": {}}}, "parameters.x says nothing about its values; give value, values, or min and max"),
        ({"parameters": {"x": {"vales": [1]}}}, "parameters.x.vales is not a key that is read here; did you mean val"),
        ({"parameters": {"x": {"values": []}}}, "parameters.x.values is []; give a list"),
        ({"parameters": {"x": {"values": [1, 2, 1]}}}, "parameters.x.values has 1 twice; leave one out"),
        ({"parameters": {"x": {"distribution": "normal", "mu": 0}}}, "x.distribution is normal; there are constant,"),
        ({"parameters": {"x": {"distribution": "beta"}}}, "parameters.x.distribution is beta; there are constant,"),
        ({"parameters": {"x": {"distribution": "uniform", "values": [1]}}}, "parameters.x.values does not go with"),
        ({"parameters": {"x": {"min": 0}}}, "parameters.x.max is missing; distribution uniform needs it"),
        ({"parameters": {"x": {"min": 2, "max": 1}}}, "parameters.x.min=2 is above max=1; exchange them"),
        ({"parameters": {"x": {"min": "3e-4", "max": 1}}}, "parameters.x.min=3e-4 is text to YAML; write 0.0003"),
        ({"parameters": {"x": {"min": "1e-5", "max": 1}}}, "parameters.x.min=1e-5 is text to YAML; write 1.0e-05"),
        ({"parameters": {"x": {"distribution": "int_uniform", "min": 0.5, "max": 2}}}, "take distribution: uniform"),
        ({"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "min=0 has no logarithm"),
        ({"parameters": {"x": {"distribution": "log_uniform", "min": 1, "max": 1000}}}, "write log_uniform_values"),
        ({"parameters": {"x": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}}, "parameters.x.q is 0; give"),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [1]}}}, "give 2 numbers, one for each value"),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [1, 1]}}}, "from 0 on with the sum 1"),
        (
            {"method": "bayes", "parameters": {"x": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
            "parameters.x.probabilities are for method random",
        ),
        ({"method": "grid"}, "parameters.x is continuous and method is grid; give values"),
        ({"program": None}, "program is missing; write program: train.py"),
        ({"program": "nowhere.py"}, "program nowhere.py does not exist in"),
        ({"command": "python train.py"}, "command is python train.py; give a list"),
        ({"command": ["python", "${program}"]}, "command has no ${args...}, so all trials would be alike"),
        ({"command": ["${argz}", "${args}"]}, "command: ${argz} is not a macro; did you mean args"),
        ({"command": ["${args}", "${envvar:NOT_SET}"]}, "names a variable that is not set; export NOT_SET=..."),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type is median; there are hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "both or neither of min_iter and max_iter; give one"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate.s is None; give a whole number"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 1}}, "early_terminate.eta is 1; give a whole"),
        ({"run_cap": 0}, "run_cap is 0; give a whole number from 1 on"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_with_the_key_and_what_to_do(place, change, said):
    path = place.write(**change)
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as refusal:
        read(path)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no keys"),
        ("- a\n- b\n", "holds no keys"),
        ("method: [grid\nmetric: {", "line 2: "),
        ("method: \x00", "write it as YAML"),
    ],
)
def test_a_file_that_is_no_sweep_file_is_refused(place, text, said):
    path = place.write()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as refusal:
        read(path)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_refusals_are_one_line_of_the_command_line(place):
    assert place.refused(method="gird") == "method is gird; there are grid, random, bayes"
    place.write()
    status, _, err = place.sweep()
    assert status == 1
    assert err == "error: sweep.yaml: run_cap is missing, and random never ends by itself; give --trials 50\n"
    (place.path / "sweep.yaml").unlink()
    status, _, err = place.sweep()
    assert err.startswith("error: sweep.yaml: there is no such file; give a sweep file")


ARGUMENTS = {"optimizer.lr": 1e-05, "n": 3, "on": True, "off": False, "words": "[a,b]", "none": None, "deep": {"a": 1}}
BEFORE = ["${env}", "${interpreter}", "${program}", "fixed=1"]
TEMPLATES = [
    None,
    *([*BEFORE, f"${{{name}}}"] for name in macros("", {}, "")),
    ["python", "${program}", "out=${envvar:HOME}/x", "${args}"],
]


@pytest.mark.parametrize("command", TEMPLATES, ids=str)
def test_a_command_is_the_one_that_w_and_bs_own_agent_starts(place, monkeypatch, command):
    """Both are started, and the program writes down what it was given."""
    from wandb.wandb_agent import Agent

    parameters = {name: {"value": value} for name, value in ARGUMENTS.items()}
    (place.path / "dump.py").write_text(DUMP)
    for name in ("DIR", "SWEEP_ID", "RUN_ID", "SWEEP_PARAM_PATH"):  # the agent sets what is not set
        monkeypatch.setenv(f"WANDB_{name}", "s" if name == "SWEEP_ID" else "")
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")

    monkeypatch.setenv("DUMP", "theirs.json")
    agent = Agent(api=None, queue=None)
    agent._sweep_command = list(command or [])
    agent._command_run({"run_id": "r", "program": "dump.py", "args": parameters})
    assert agent._run_processes["r"].wait() in (0, None)

    monkeypatch.setenv("DUMP", "ours.json")
    has_arguments = command is None or any("${args" in part for part in command)
    given = command if has_arguments else [*command, "${args}"]
    sweep = read(place.write(program="dump.py", command=given, parameters=parameters))
    words = sweep.words(sweep.arguments({}), "wandb/sweep-s/config-r.json")
    subprocess.run(words if has_arguments else words[: -len(ARGUMENTS)], check=True)
    theirs, ours = (json.loads((place.path / name).read_text()) for name in ("theirs.json", "ours.json"))
    assert ours == theirs


def test_numbers_are_spelled_so_that_hydra_reads_them(place):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweep = read(place.write(command=["${args_no_hyphens}"], parameters={"lr": {"values": [1e-5, 1e-4, 0.1, 12]}}))
    words = [sweep.words(sweep.arguments({"lr": choice}))[0] for choice in sweep.parameters[0].choices]
    assert words[0] == "lr=1e-05"
    assert [OverridesParser.create().parse_override(word).value() for word in words] == [1e-5, 1e-4, 0.1, 12]


SFT = {"program": str(TRAIN), "command": ["python", "${program}", "model=sft", "${args_no_hyphens}"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parameters": {"optimizer.lrr": {"value": 1}}}, "did you mean optimizer.lr"),
        ({"parameters": {"model": {"values": ["sft", "sfft"]}}}, "there is no such model; did you mean sft"),
        ({"parameters": {"optimizer": {"parameters": {"lr": {"value": 1}}}}}, "for train.py write optimizer.lr: ..."),
        ({"parameters": {"threads": {"values": [None, 1]}}}, "parameters.threads has null"),
        ({"command": ["python", "${program}", "${args}"], "parameters": {"seed": {"value": 1}}}, "${args_no_hyphens}"),
    ],
)
def test_words_that_train_py_would_refuse_are_refused_before_any_trial(place, change, said):
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as refusal:
        read(place.write(**{**SFT, **change}))
    assert said in str(refusal.value)


@pytest.mark.parametrize("path", sorted((TRAIN.parent / "conf" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_repository_can_be_read(path, monkeypatch):
    monkeypatch.chdir(TRAIN.parent)
    sweep = read(path)
    assert sweep.trains
    assert yaml.safe_load(path.read_text())["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    point = {axis.name: axis.draw(random.Random(1)) for axis in sweep.axes}
    assert "train.py model=" in shlex.join(sweep.words(sweep.arguments(point)))
