"""Bandits and logs of bandits from files: tables of an .npz, rows of a CSV."""

import csv
import logging
import math
from pathlib import Path

import numpy as np
import torch

from datamodules.bandit_instances import table
from datamodules.batches import Bandit, BanditLog

Rows = list[tuple[int, dict[str, str]]]  # the number of the line, counted from 1 with the header, and its cells


def from_file(path: str, noise: float, reward_range: list[float] | None) -> Bandit:
    """The tables `pi0` and `reward` (contexts, actions) of an .npz file, and `d0` (contexts), uniform without it.

    A CSV file has a row for every context and action instead: context, action, pi0, reward and, if wanted, d0. Mean
    rewards lie in `reward_range`, by default [0, 1] or what they span beyond that. An action that the reference takes
    in no context is left out, with a warning. Raises FileNotFoundError, or ValueError naming the place of what is
    wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.instance.path={path} does not exist: give an .npz or a .csv with pi0 and reward")
    tables = _from_npz(path) if path.endswith(".npz") else _from_csv(path)
    reference, reward = tables["pi0"], tables["reward"]
    if reference.ndim != 2 or reference.shape != reward.shape:
        raise ValueError(
            f"{path}: pi0 is {reference.shape} and reward {reward.shape}: both must be (contexts, actions)"
        )
    never = (reference == 0).all(0)
    if never.any():
        logging.warning(
            f"{path}: the reference never takes action {int(never.argmax())}, which is left out (all in all "
            f"{int(never.sum())} of {len(never)}); those after it move up"
        )
        reference, reward = reference[:, ~never], reward[:, ~never]
    contexts = torch.from_numpy(tables["d0"]) if "d0" in tables else None
    low, high = reward_range or (min(0.0, float(np.nanmin(reward))), max(1.0, float(np.nanmax(reward))))
    if not low < high:
        raise ValueError(f"data.instance.reward_range=[{low}, {high}]: the first must be less than the second")
    return table(path, reward, reference, noise, contexts, reward_range=(low, high))


def _from_npz(path: str) -> dict[str, np.ndarray]:
    tables = np.load(path, allow_pickle=False)
    missing = {"pi0", "reward"} - set(tables)
    if missing:
        raise ValueError(f"{path} has no table {min(missing)}: save it with numpy.savez(path, pi0=..., reward=...)")
    return {name: np.asarray(tables[name], dtype=np.float64) for name in ("pi0", "reward", "d0") if name in tables}


def _from_csv(path: str) -> dict[str, np.ndarray]:
    names, rows = _read(path, ("context", "action", "pi0", "reward"))
    places = [(_index(path, line, row, "context"), _index(path, line, row, "action")) for line, row in rows]
    shape = tuple(max(place[axis] for place in places) + 1 for axis in (0, 1))
    if len(set(places)) < len(places) or len(places) < math.prod(shape):
        raise ValueError(
            f"{path} has {len(places)} rows for {shape[0]} contexts and {shape[1]} actions: give each pair once"
        )
    tables = {name: np.empty(shape) for name in ("pi0", "reward")} | (
        {"d0": np.empty(shape[0])} if "d0" in names else {}
    )
    for (line, row), (context, action) in zip(rows, places):
        for name in ("pi0", "reward"):
            tables[name][context, action] = _number(path, line, row, name)
        if "d0" in tables:
            tables["d0"][context] = _number(path, line, row, "d0")
    return tables


def read_log(path: str, bandit: Bandit) -> BanditLog:
    """The rows of a CSV file: context, action, reward and, if wanted, propensity; or context, action1, action2, label.

    Raises FileNotFoundError, or ValueError with the number of the line that is wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.log={path} does not exist: give a .csv with context, action and reward")
    names, rows = _read(path, ("context",))
    pairs = "label" in names
    needed = ("action1", "action2", "label") if pairs else ("action", "reward")
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]}: rows are context,action,reward[,propensity] or "
            "context,action1,action2,label"
        )
    contexts = [_within(path, line, row, "context", len(bandit.contexts)) for line, row in rows]
    arms = bandit.log_reference.shape[1]
    actions = [[_within(path, line, row, name, arms) for name in needed[:-1]] for line, row in rows]
    outcome = [_label(path, line, row) if pairs else _number(path, line, row, "reward") for line, row in rows]
    behaviour = bandit.log_reference.exp()
    if "propensity" in names and not pairs:
        behaviour = behaviour.clone()
        for (line, row), context, (action,) in zip(rows, contexts, actions):
            behaviour[context, action] = _propensity(path, line, row)
    return BanditLog(
        torch.tensor(contexts), torch.tensor(actions), torch.tensor(outcome, dtype=torch.float64), behaviour
    )


def _read(path: str, needed: tuple[str, ...]) -> tuple[list[str], Rows]:
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(enumerate(reader, start=2))
        names = list(reader.fieldnames or [])
    missing = [name for name in needed if name not in names]
    if missing or not rows:
        raise ValueError(
            f"{path} has {f'no column {missing[0]}' if missing else 'no rows'}: its first line names columns"
        )
    return names, rows


def _number(path: str, line: int, row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{path}, line {line}: {name} is {row[name]!r}, which is no finite number: correct or drop the row"
        )
    return value


def _index(path: str, line: int, row: dict[str, str], name: str) -> int:
    value = _number(path, line, row, name)
    if value < 0 or value != int(value):
        raise ValueError(f"{path}, line {line}: {name} is {row[name]!r}: they are counted 0, 1, 2, ...")
    return int(value)


def _within(path: str, line: int, row: dict[str, str], name: str, count: int) -> int:
    value = _index(path, line, row, name)
    if value >= count:
        raise ValueError(f"{path}, line {line}: {name} is {value}, and the instance has 0 to {count - 1}")
    return value


def _label(path: str, line: int, row: dict[str, str]) -> float:
    value = _number(path, line, row, "label")
    if value not in (0, 1):
        raise ValueError(f"{path}, line {line}: label is {row['label']!r}: 1 where action1 won and 0 where action2 did")
    return value


def _propensity(path: str, line: int, row: dict[str, str]) -> float:
    value = _number(path, line, row, "propensity")
    if not 0 < value <= 1:
        raise ValueError(f"{path}, line {line}: propensity is {value:g}, which is no probability above 0")
    return value
