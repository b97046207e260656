"""W&B's sweep file: what the trials are drawn from, and the command that each of them is.

The format is https://docs.wandb.ai/models/sweeps/sweep-config-keys; docs/sweeps.md lists what is read of it. Whatever
is wrong raises ValueError with one sentence that begins with the file and the key.
"""

import hashlib
import json
import math
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tessera.words import nearest, problems

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
METHODS = ("grid", "random", "bayes")
TOP = ("program", "method", "metric", "parameters", "command", "early_terminate", "run_cap")
LABELS = ("name", "description", "project", "entity")
# raising the cap or wording the description anew goes on with the same study
NOT_IDENTITY = ("run_cap", "description", "project", "entity")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")

RANGE, RANGE_Q = ("min", "max"), ("min", "max", "q")
DISTRIBUTIONS = {  # and the keys that go with each
    "constant": ("value",),
    "categorical": ("values", "probabilities"),
    "int_uniform": RANGE,
    "uniform": RANGE,
    "q_uniform": RANGE_Q,
    "log_uniform": RANGE,
    "q_log_uniform": RANGE_Q,
    "inv_log_uniform": RANGE,
    "log_uniform_values": RANGE,
    "q_log_uniform_values": RANGE_Q,
    "inv_log_uniform_values": RANGE,
}


@dataclass(frozen=True)
class Parameter:
    """One axis of the search: a choice among values, or a range.

    A choice is drawn and stored as JSON text, a quantised number as the number before rounding: `spoken` gives what
    stands in the command.
    """

    keys: tuple[str, ...]  # more than one where parameters are nested
    choices: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False
    q: float | None = None

    @property
    def name(self) -> str:
        """The keys with dots between them."""
        return ".".join(self.keys)

    def draw(self, generator: random.Random) -> str | float:
        """A random point of the axis."""
        if self.choices:
            return generator.choices(self.choices, self.probabilities or None)[0]
        if self.whole:
            return generator.randint(int(self.low), int(self.high))
        if self.log:
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
            return min(max(drawn, self.low), self.high)
        return generator.uniform(self.low, self.high)

    def spoken(self, drawn: str | float) -> Any:
        """The value in the command; a whole `q` makes whole numbers, as W&B does."""
        if self.choices:
            return json.loads(drawn)
        if self.whole or self.q is None:
            return int(drawn) if self.whole else float(drawn)
        rounded = round(drawn / self.q) * self.q
        return int(rounded) if isinstance(self.q, int) else float(f"{rounded:.12g}")


@dataclass(frozen=True)
class EarlyStop:
    """Hyperband's rungs: a trial is judged at `first`, `first * eta`, ... values of its metric, below `last`."""

    first: int
    eta: int
    last: int | None


@dataclass(frozen=True)
class Sweep:
    """A sweep file that can be carried out."""

    path: Path
    name: str
    method: str
    metric: str
    maximize: bool
    target: float | None
    parameters: tuple[Parameter, ...]
    program: str
    command: tuple[str, ...]
    early_stop: EarlyStop | None
    run_cap: int | None
    digest: str

    @property
    def axes(self) -> list[Parameter]:
        """The parameters that differ between trials, in an order that the file's does not change."""
        return sorted((p for p in self.parameters if len(p.choices) != 1), key=lambda p: p.name)

    @property
    def grid_size(self) -> int | None:
        """How many points a grid has; None for the other methods."""
        return math.prod(len(axis.choices) for axis in self.axes) if self.method == "grid" else None

    @property
    def trains(self) -> bool:
        """Whether the program is this repository's train.py, whose words can be checked."""
        return Path(self.program).resolve() == TRAIN

    def point(self, number: int) -> dict[str, str | float]:
        """What trial `number` draws under grid and random search, whichever agent carries it out."""
        if self.method == "grid":
            sizes = [len(axis.choices) for axis in self.axes]
            strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
            return {a.name: a.choices[number // s % n] for a, s, n in zip(self.axes, strides, sizes)}
        return {axis.name: axis.draw(random.Random(f"{self.digest} {number} {axis.name}")) for axis in self.axes}

    def arguments(self, drawn: dict[str, str | float]) -> dict[str, Any]:
        """The trial's parameters as W&B hands them to an agent: nested where the file nests them."""
        arguments: dict[str, Any] = {}
        for parameter in self.parameters:
            place = arguments
            for key in parameter.keys[:-1]:
                place = place.setdefault(key, {})
            constant = parameter.choices[0] if len(parameter.choices) == 1 else None
            place[parameter.keys[-1]] = parameter.spoken(constant or drawn[parameter.name])
        return arguments

    def words(self, arguments: dict[str, Any], json_file: Path | str = "") -> list[str]:
        """The command of a trial, spelled as W&B's agent spells it."""
        forms = macros(self.program, arguments, json_file)
        return [word for part in self.command for word in forms.get(_macro(part), [_with_environment(part)])]


def macros(program: str, arguments: dict[str, Any], json_file: Path | str) -> dict[str | None, list[str]]:
    """W&B's command macros and the words that they stand for."""
    pairs = [f"{name}={value}" for name, value in arguments.items()]
    flags = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in arguments.items() if value is not False
    ]
    return {
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [program],
        "args": [f"--{pair}" for pair in pairs],
        "args_no_hyphens": pairs,
        "args_no_equals": [word for name, value in arguments.items() for word in (f"--{name}", str(value))],
        "args_no_boolean_flags": flags,
        "args_append_hydra": [f"+{pair}" for pair in pairs],
        "args_override_hydra": [f"++{pair}" for pair in pairs],
        "args_json": [json.dumps(arguments)],
        "args_json_file": [str(json_file)],
    }


def _macro(part: str) -> str | None:
    return part[2:-1] if part.startswith("${") and part.endswith("}") else None


ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


def _with_environment(part: str) -> str:
    return ENVIRONMENT.sub(lambda found: os.environ[found.group(1)], part)


def read(path: Path) -> Sweep:
    """The sweep that a file describes. Raises ValueError with one sentence."""
    try:
        sweep = _sweep(path, _content(path))
        if sweep.trains:
            _refuse_words(sweep)
        return sweep
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError("there is no such file; give a sweep file such as conf/sweep/dqo.yaml")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or 'not text'}; write it as YAML") from None
    if not isinstance(content, dict):
        raise ValueError("holds no keys; write method, metric, parameters and program as in conf/sweep/dqo.yaml")
    return json.loads(json.dumps(content, default=str))


def _sweep(path: Path, content: dict[str, Any]) -> Sweep:
    _known(content, (*TOP, *LABELS))
    method = _one_of("method", content.get("method"), METHODS)
    name, maximize, target = _metric(content.get("metric"))
    parameters = tuple(_parameters((), content.get("parameters")))
    program, command = _command(content)
    identity = {key: value for key, value in content.items() if key not in NOT_IDENTITY}
    return Sweep(
        path=path,
        name=re.sub(r"[^\w.-]+", "-", str(content.get("name") or path.stem)),
        method=method,
        metric=name,
        maximize=maximize,
        target=target,
        parameters=tuple(_fit(parameter, method) for parameter in parameters),
        program=program,
        command=command,
        early_stop=_early_stop(content.get("early_terminate")),
        run_cap=_whole("run_cap", content["run_cap"], 1) if "run_cap" in content else None,
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    )


def _known(given: dict[str, Any], keys: Iterable[str], place: str = "") -> None:
    for key in given:
        if key not in keys:
            raise ValueError(f"{place}{key} is not a key that is read here; {nearest(key, list(keys))}")


def _one_of(key: str, value: Any, known: Iterable[str]) -> str:
    if value not in known:
        said = "is missing" if value is None else f"is {value}"
        raise ValueError(f"{key} {said}; there are {', '.join(known)}")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        spelled = repr(float(value))
        raise ValueError(
            f"{key}={value} is text to YAML; write {spelled if '.' in spelled else spelled.replace('e', '.0e')}"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} is {value}; give a number")
    return value


def _whole(key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} is {value}; give a whole number from {least} on")
    return value


def _metric(metric: Any) -> tuple[str, bool, float | None]:
    if not isinstance(metric, dict):
        raise ValueError("metric is missing; write metric: {name: ..., goal: maximize}, so that trials can be compared")
    _known(metric, ("name", "goal", "target"), "metric.")
    if not isinstance(metric.get("name"), str):
        raise ValueError(f"metric.name is {metric.get('name')}; give the name of a column of metrics.csv")
    goal = _one_of("metric.goal", metric.get("goal", "minimize"), ("minimize", "maximize"))
    target = _number("metric.target", metric["target"]) if "target" in metric else None
    return metric["name"], goal == "maximize", target


def _parameters(above: tuple[str, ...], given: Any) -> Iterator[Parameter]:
    place = ".".join(("parameters", *(f"{key}.parameters" for key in above)))
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{place} is empty; name at least one, such as optimizer.lr: {{values: [0.001, 0.0001]}}")
    for key, settings in given.items():
        if not isinstance(settings, dict):
            raise ValueError(f"{place}.{key} is {settings}; write {{value: {settings}}} or {{values: [...]}}")
        if "parameters" in settings:
            _known(settings, ("parameters",), f"{place}.{key}.")
            yield from _parameters((*above, key), settings["parameters"])
        else:
            yield _parameter((*above, key), f"{place}.{key}", settings)


def _parameter(keys: tuple[str, ...], place: str, given: dict[str, Any]) -> Parameter:
    if "distribution" in given:
        _one_of(f"{place}.distribution", given["distribution"], DISTRIBUTIONS)
    _known(given, ("distribution", "value", "values", "probabilities", "min", "max", "q"), f"{place}.")
    kind = given.get("distribution") or _kind(place, given)
    wanted = DISTRIBUTIONS[kind]
    for key in given:
        if key not in (*wanted, "distribution"):
            raise ValueError(f"{place}.{key} does not go with distribution {kind}; there are {', '.join(wanted)}")
    for key in wanted:
        if key not in given and key not in ("q", "probabilities"):
            raise ValueError(f"{place}.{key} is missing; distribution {kind} needs it")
    if kind == "constant":
        return Parameter(keys, choices=(json.dumps(given["value"]),))
    return _choice(keys, place, given) if kind == "categorical" else _range(keys, place, kind, given)


def _kind(place: str, given: dict[str, Any]) -> str:
    """W&B's rule where no distribution is named."""
    if "value" in given or "values" in given:
        return "constant" if "value" in given else "categorical"
    if "min" not in given and "max" not in given:
        raise ValueError(f"{place} says nothing about its values; give value, values, or min and max")
    ends = [given.get("min"), given.get("max")]
    return "int_uniform" if all(type(end) is int for end in ends) else "uniform"


def _choice(keys: tuple[str, ...], place: str, given: dict[str, Any]) -> Parameter:
    values, chances = given["values"], given.get("probabilities", [])
    if not isinstance(values, list) or not values:
        raise ValueError(f"{place}.values is {values}; give a list with at least one value")
    choices = tuple(json.dumps(value) for value in values)
    twice = [choice for choice in choices if choices.count(choice) > 1]
    if twice:
        raise ValueError(f"{place}.values has {twice[0]} twice; leave one out")
    if chances:
        if not isinstance(chances, list) or len(chances) != len(values):
            raise ValueError(f"{place}.probabilities is {chances}; give {len(values)} numbers, one for each value")
        sound = all(_number(f"{place}.probabilities", chance) >= 0 for chance in chances)
        if not sound or not math.isclose(sum(chances), 1, abs_tol=1e-6):
            raise ValueError(f"{place}.probabilities is {chances}; give numbers from 0 on with the sum 1")
    return Parameter(keys, choices=choices, probabilities=tuple(chances))


def _range(keys: tuple[str, ...], place: str, kind: str, given: dict[str, Any]) -> Parameter:
    low, high = (_number(f"{place}.{end}", given[end]) for end in RANGE)
    if low > high:
        raise ValueError(f"{place}.min={low} is above max={high}; exchange them")
    whole, log = kind == "int_uniform", "log" in kind
    if whole and not (type(low) is int and type(high) is int):
        raise ValueError(f"{place}.min={low} and max={high} are not both whole; take distribution: uniform")
    if log:
        low, high = _logarithmic(place, kind, low, high)
    q = _number(f"{place}.q", given.get("q", 1)) if kind.startswith("q_") else None
    if q is not None and q <= 0:
        raise ValueError(f"{place}.q is {q}; give a step above 0")
    return Parameter(keys, low=low, high=high, log=log, whole=whole, q=q)


def _logarithmic(place: str, kind: str, low: float, high: float) -> tuple[float, float]:
    """The range of values: without `_values`, W&B's min and max are exponents of e; `inv_` turns those of 1/x."""
    if kind.endswith("_values"):
        if low <= 0:
            raise ValueError(f"{place}.min={low} has no logarithm; give a min above 0, or distribution: uniform")
        return low, high
    if max(abs(low), abs(high)) > 300:
        raise ValueError(f"{place}: min and max of {kind} are exponents of e; for values write log_uniform_values")
    return (math.exp(-high), math.exp(-low)) if kind.startswith("inv_") else (math.exp(low), math.exp(high))


def _fit(parameter: Parameter, method: str) -> Parameter:
    """The parameter as a method takes it: a grid counts whole numbers up, and only random search draws unevenly."""
    place = f"parameters.{parameter.name}"
    if parameter.probabilities and method != "random":
        raise ValueError(f"{place}.probabilities are for method random; leave them out or change the method")
    if method != "grid" or parameter.choices:
        return parameter
    if not parameter.whole:
        raise ValueError(f"{place} is continuous and method is grid; give values: [...], or method random or bayes")
    numbers = range(int(parameter.low), int(parameter.high) + 1)
    return Parameter(parameter.keys, choices=tuple(str(number) for number in numbers))


def _early_stop(given: Any) -> EarlyStop | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"early_terminate is {given}; write early_terminate: {{type: hyperband, min_iter: 3}}")
    place = "early_terminate."
    _known(given, ("type", "min_iter", "max_iter", "s", "eta"), place)
    _one_of(f"{place}type", given.get("type"), ("hyperband",))
    if ("min_iter" in given) == ("max_iter" in given):
        raise ValueError(
            "early_terminate has both or neither of min_iter and max_iter; give one (s goes with max_iter)"
        )
    eta = _whole(f"{place}eta", given.get("eta", 3), 2)
    if "min_iter" in given:
        return EarlyStop(_whole(f"{place}min_iter", given["min_iter"], 1), eta, None)
    last, brackets = _whole(f"{place}max_iter", given["max_iter"], 1), _whole(f"{place}s", given.get("s"), 1)
    return EarlyStop(max(1, last // eta**brackets), eta, last)


def _command(content: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    program, command = content.get("program"), content.get("command", list(COMMAND))
    if not isinstance(program, str):
        raise ValueError("program is missing; write program: train.py")
    if not Path(program).is_file():
        raise ValueError(f"program {program} does not exist in {Path.cwd()}; give the path of a file")
    if not isinstance(command, list) or not command:
        raise ValueError(f"command is {command}; give a list such as [python, '${{program}}', '${{args_no_hyphens}}']")
    parts = tuple(str(part) for part in command)
    for part in parts:
        _refuse_part(part)
    if not any((_macro(part) or "").startswith("args") for part in parts):
        raise ValueError("command has no ${args...}, so all trials would be alike; add ${args_no_hyphens}")
    return program, parts


def _refuse_part(part: str) -> None:
    missing = [name for name in ENVIRONMENT.findall(part) if name not in os.environ]
    if missing:
        raise ValueError(f"command: {part} names a variable that is not set; export {missing[0]}=...")
    macro, known = _macro(part), list(macros("", {}, ""))
    if macro is not None and macro not in known and not ENVIRONMENT.search(part):
        raise ValueError(f"command: {part} is not a macro; {nearest(macro, known)}")


def _refuse_words(sweep: Sweep) -> None:
    """Let train.py's own check see the words of trials, before any of them starts."""
    for parameter in sweep.parameters:
        if len(parameter.keys) > 1:
            raise ValueError(
                f"parameters.{parameter.keys[0]} is nested, which W&B hands on as one dictionary; for train.py write "
                f"{parameter.name}: ..."
            )
        if "null" in parameter.choices:
            raise ValueError(f"parameters.{parameter.name} has null, which W&B spells None; for train.py write 'null'")
    for command in _samples(sweep):
        after = next((n for n, word in enumerate(command, 1) if Path(word).resolve() == TRAIN), len(command))
        hyphens = [word for word in command[after:] if word.startswith("-")]
        if hyphens:
            raise ValueError(
                f"command gives train.py {hyphens[0]}; it reads words without hyphens: ${{args_no_hyphens}}"
            )
        for reason in problems(command[after:]):
            raise ValueError(f"{reason} (in the command of a trial)")


def _samples(sweep: Sweep) -> Iterator[list[str]]:
    """Commands in which every word that a choice may be stands once, and one number of each axis."""
    points = {axis.name: _words_and_a_number(axis.choices) or [axis.low] for axis in sweep.axes}
    for n in range(max(map(len, points.values()), default=1)):
        drawn = {name: among[n % len(among)] for name, among in points.items()}
        yield sweep.words(sweep.arguments(drawn))


def _words_and_a_number(choices: tuple[str, ...]) -> list[str]:
    words = [choice for choice in choices if isinstance(json.loads(choice), str)]
    return words + [choice for choice in choices if choice not in words][:1]
