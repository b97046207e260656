"""The command line, read and checked before anything heavy is imported."""

import difflib
import glob
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from tessera.compose import CONF, compose

# Words of the main run that are about its own method: a run that prepares or compares has its own
OWN = (
    *("model", "objective", "pairwise", "oracle", "algorithm", "optimizer", "scheduler", "start", "compare", "stages"),
    *("against", "bonus", "decision", "grid", "kernel", "noise", "path", "sampler", "study"),
    *("ckpt_path", "policy_weights", "record"),
)
PATHS = ("data.path", "data.trajectories", "ckpt_path", "policy_weights")


class Refusal(ValueError):
    """A command line that cannot run, with every reason found."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = reasons


def groups() -> dict[str, dict[str, str]]:
    """Every configuration group with its words, each with the first comment line of its file."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        found.setdefault(path.parent.name, {})[path.stem] = about(f"{path.parent.name}/{path.stem}")
    return found


def about(choice: str) -> str:
    """The first comment line of `conf/<choice>.yaml`, where it has one."""
    lines = (CONF / f"{choice}.yaml").read_text().splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and "@package" not in line), "")


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean ...?)` where something known is close, the shortest list of choices where little is known."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    tails = {key.rsplit(".")[-1]: key for key in reversed(known)}
    close += [tails[tail] for tail in difflib.get_close_matches(word.rsplit(".")[-1], tails, n=2, cutoff=0.75)]
    if close:
        return "did you mean " + " or ".join(dict.fromkeys(close)) + "?"
    return "there are " + ", ".join(known) if len(known) <= 20 else "`python train.py --cfg job` lists all"


def phase(words: list[str], user: list[str]) -> list[str]:
    """The words of a run that prepares or compares: the user's shared words, then its own.

    Games that are compared have the same oracle, unless their own words choose one.
    """
    shared = [word for word in user if _root(word) not in OWN and word.partition("=")[0] != "resume"]
    never = [word for word in user if word == "resume=never"]
    judged = [word for word in user if _of_oracle(word)]
    if judged and not any(map(_of_oracle, words)) and "oracle" in compose(words)[0].model:
        shared += judged
    return [*words, *shared, *never, "compare=null"]


def _of_oracle(word: str) -> bool:
    return _root(word) == "oracle" or word.lstrip("+~").startswith("model.oracle.")


def _root(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


def problems(words: list[str], multirun: bool = False) -> list[str]:
    """One sentence for everything that is wrong with a command line. Empty when it composes."""
    parsed, found = _parse(words)
    known = groups()
    sound: list[str] = []
    for override in parsed:
        reason = _wrong_choice(override, known, multirun)
        if reason:
            found.append(reason)
        elif override.key_or_group in known:
            sound += _first_choice(override)
    config = _composed(sound, found)
    if config is not None:
        values = [override for override in parsed if override.key_or_group.partition("@")[0] not in known]
        found += [reason for override in values for reason in _wrong_value(override, config, multirun)]
        if not found and not multirun:
            found += _whole(words)
    return found


def _parse(words: list[str]) -> tuple[list[Override], list[str]]:
    parsed, found = [], []
    for word in words:
        try:
            parsed.append(OverridesParser.create().parse_override(word))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            found.append(f"{word}: not of the form key=value ({reason}); quote values with special characters")
    return parsed, found


def _choices(override: Override) -> list[Any]:
    if override.value_type == ValueType.CHOICE_SWEEP:
        return list(override.sweep_iterator())
    return [override.value()] if override.value_type in (ValueType.ELEMENT, None) else []


def _wrong_choice(override: Override, known: dict[str, dict[str, str]], multirun: bool) -> str | None:
    group = override.key_or_group
    if group not in known:
        return None
    if override.is_sweep_override() and not multirun:
        return f"{override.input_line}: several values are a sweep, which needs -m"
    unknown = [value for value in _choices(override) if str(value) not in known[group]]
    if not unknown:
        return None
    return f"{group}={unknown[0]}: there is no such {group}; {nearest(str(unknown[0]), list(known[group]))}"


def _first_choice(override: Override) -> list[str]:
    values = _choices(override)
    return [f"{override.get_key_element()}={values[0]}"] if values else []


def _composed(words: list[str], found: list[str]) -> DictConfig | None:
    try:
        return compose(words)[0]
    except (HydraException, OmegaConfBaseException) as error:
        said = [line for line in str(error).splitlines() if not line.startswith("To append")]
        found.append(_homeless(said[0]) or " ".join(said[:2]))
        return None


def _homeless(said: str) -> str | None:
    """The sentence for a group that none of the words has, such as `algorithm=mpo` without `model=markov_game`."""
    match = re.match(r"(?:In '(\w+)/(\w+)': )?Could not override '(\w+)'", said)
    if match is None:
        return None
    asking, group = f"{match[1]}={match[2]}" if match[1] else f"{match[3]}=...", match[3]
    homes = [path for path in sorted(CONF.glob("*/*.yaml")) if re.search(rf"^ *- /{group}:", path.read_text(), re.M)]
    if not homes:  # a group that another word places, which Hydra's own sentence names
        return None
    words = " or ".join(f"{path.parent.name}={path.stem}" for path in homes)
    return f"{asking} does not fit the other words: conf/{group}/ is for {words}"


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not OmegaConf.is_dict(node):
        return []
    names = [f"{prefix}{key}" for key in node]
    below = [_keys(node._get_node(key), f"{prefix}{key}.") for key in node if OmegaConf.is_dict(node._get_node(key))]
    return names + [name for group in below for name in group]


def _wrong_value(override: Override, config: DictConfig, multirun: bool) -> list[str]:
    key, keys = override.key_or_group, _keys(config)
    if override.is_add() or override.is_delete() or override.is_force_add() or key.startswith("hydra"):
        return []
    if key not in keys:
        return [f"{override.input_line}: there is no key {key}; {nearest(key, keys + list(groups()))}"]
    if override.is_sweep_override():
        return [] if multirun else [f"{override.input_line}: several values are a sweep, which needs -m"]
    return _wrong_type(key, override.value(), config)


def _wrong_type(key: str, value: Any, config: DictConfig) -> list[str]:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    default = OmegaConf.to_container(node).get(name)
    if isinstance(default, dict) and not isinstance(value, dict) and value is not None:
        return [f"{key}={value}: {key} is a group of keys; {_into(key, value, default)}"]
    if isinstance(default, bool) and not isinstance(value, bool):
        return [f"{key}={value}: expected true or false"]
    if key == "trainer.devices" and value not in ("auto", -1) and not (type(value) is int and value > 0):
        return [f"{key}={value}: expected a number of processes, or auto"]
    numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
    if numeric and key != "trainer.devices" and (isinstance(value, bool) or not isinstance(value, (int, float))):
        interpolated = isinstance(value, str) and value.startswith("${")
        return [] if interpolated or value is None else [f"{key}={value}: expected a number such as {default}"]
    if numeric and isinstance(default, int) and isinstance(value, float):
        return [f"{key}={value}: expected a whole number such as {default}"]
    if key in PATHS and isinstance(value, str) and not glob.glob(str(Path(value).expanduser())):
        return [f"{key}={value}: there is no such file or folder"]
    return []


def _into(key: str, value: Any, default: dict[str, Any]) -> str:
    group = key.rpartition(".")[2]
    if str(value) in groups().get(group, {}):
        return f"{group}@{key}={value} takes another file of conf/{group}/"
    return "change one of " + ", ".join(f"{key}.{name}" for name in default)


def _whole(words: list[str]) -> list[str]:
    """What shows only when all words are put together: missing values, and the runs that it asks for first."""
    found: list[str] = []
    config = _composed(words, found)
    if config is None:
        return found
    try:
        found += [f"{key} needs a value: add {key}=..." for key in sorted(OmegaConf.missing_keys(config))]
    except InterpolationKeyError as error:
        key = re.search(r"'(.+)'", str(error)).group(1)
        return [f"{error.full_key} takes the value of {key}, which is not there: these words do not fit together"]
    others = [config.start, *(config.compare or {}).values()]
    for other in others:
        if other and not found:
            found += [f"in the run `{' '.join(other)}` that this one needs: {r}" for r in _needed(list(other), words)]
    return found


def _needed(own: list[str], words: list[str]) -> list[str]:
    found: list[str] = []
    _composed(phase(own, words), found)
    return found


def help_text() -> str:
    """What `--help` prints: how to speak to train.py, and every word of every group."""
    lines = [
        "python train.py [word ...]      one experiment, for example",
        "  python train.py model=dqo data=gsm8k",
        "  python train.py model=rft data=math policy=smollm2 trainer.max_steps=20 optimizer.lr=1e-5",
        "  torchrun --nproc-per-node 8 train.py trainer=ddp        or trainer.devices=8 without torchrun",
        "",
        "  key=value changes a value, group=word takes another file of conf/<group>/, -m a=1,2 runs a grid",
        "  --cfg job prints the composed configuration; debug=full shows tracebacks",
        "  the same command continues an interrupted run; resume=never starts anew",
        "",
    ]
    for group, choices in groups().items():
        if group in ("reading", "recipe", "sweep", "tuning"):
            continue
        lines.append(f"{group}=")
        lines += [f"  {word:<16} {comment}" for word, comment in choices.items()]
    return "\n".join(lines)
