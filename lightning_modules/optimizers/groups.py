"""Which options of an optimizer are for which parameters: rules by role and by name.

    groups:
      matrices: {roles: [matrix, kernel], unless: lm_head}
      others: {match: lm_head, roles: [matrix], algo: adamw}
      vectors: {roles: [vector, embedding], lr_mult: 0.5, weight_decay: 0.0}

The role of a parameter is `embedding` where an nn.Embedding owns it, also if it is tied to another layer, else `vector`
(fewer than two axes), `matrix` (two) or `kernel` (more). A rule takes the parameters of its `roles` (all, without the
key) whose name the regular expression `match` finds and `unless` does not. Every parameter belongs to exactly one rule.
`lr_mult` multiplies the optimizer's learning rate; the other keys are options of the optimizer.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.table import Table
from torch import nn

Rules = dict[str, dict[str, Any]]
ROLES = ("matrix", "vector", "embedding", "kernel")
SELECTORS = ("roles", "match", "unless")
DEFAULT: Rules = {
    "matrices": {"roles": ["matrix", "embedding", "kernel"]},
    "vectors": {"roles": ["vector"], "weight_decay": 0.0},
}


def without_rules(make: Callable[..., torch.optim.Optimizer]) -> tuple[Callable[..., torch.optim.Optimizer], Rules]:
    """An optimizer's partial without its keyword `groups`, and the rules that this was; none where it has none."""
    if not isinstance(make, functools.partial):
        return make, {}
    keywords = dict(make.keywords)
    rules = keywords.pop("groups", None) or {}
    return functools.partial(make.func, *make.args, **keywords), rules


def roles(network: nn.Module) -> dict[str, str]:
    """The role of each trained parameter, by its name; of a tied one, by its first name."""
    embeddings = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    by_axes = {0: "vector", 1: "vector", 2: "matrix"}
    return {
        name: "embedding" if id(p) in embeddings else by_axes.get(p.ndim, "kernel")
        for name, p in network.named_parameters()
        if p.requires_grad
    }


def split(network: nn.Module, rules: Rules) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a network under each rule, in the network's order.

    Raises ValueError for a parameter that no rule takes, or more than one does, and for a rule that cannot be read.
    """
    _refuse(rules)
    parameters = dict(network.named_parameters())
    found: dict[str, list[nn.Parameter]] = {name: [] for name in rules}
    for name, role in roles(network).items():
        takers = [rule for rule, options in rules.items() if _takes(options, role, name.replace("_orig_mod.", ""))]
        if len(takers) != 1:
            raise ValueError(
                f"{name} ({role}) is taken by {' and '.join(takers) or 'no rule'} of optimizer.groups "
                f"({', '.join(rules)}): each parameter belongs to exactly one, so change their roles, match or unless"
            )
        found[takers[0]].append(parameters[name])
    return found


def options(rule: dict[str, Any], lr: float | None) -> dict[str, Any]:
    """The optimizer's options in a rule, with `lr_mult` applied to the learning rate of its network."""
    found = {key: value for key, value in rule.items() if key not in (*SELECTORS, "lr_mult")}
    if "lr_mult" in rule:
        if lr is None:
            raise ValueError("optimizer.groups has an lr_mult, and the optimizer no lr to multiply: give optimizer.lr")
        found["lr"] = rule["lr_mult"] * lr
    return found


def table(groups: Iterable[dict[str, Any]]) -> Table:
    """What an optimizer does with which parameters, a row for each of its groups."""
    made = Table("group", "tensors", "elements", "algorithm", "lr", "weight decay", box=None)
    for group in groups:
        name, algo, decay = group["group"], group.get("algo", "-"), group.get("weight_decay", 0)
        sizes = [p.numel() for p in group["params"]]
        lr = group.get("initial_lr", group["lr"])
        made.add_row(name, str(len(sizes)), f"{sum(sizes):,}", algo, f"{lr:g}", f"{decay:g}")
    return made


def _takes(rule: dict[str, Any], role: str, name: str) -> bool:
    named = "match" not in rule or re.search(rule["match"], name)
    return (
        role in rule.get("roles", ROLES) and bool(named) and not ("unless" in rule and re.search(rule["unless"], name))
    )


def _refuse(rules: Rules) -> None:
    for name, rule in rules.items():
        unknown = [role for role in rule.get("roles", ()) if role not in ROLES]
        if unknown:
            raise ValueError(f"optimizer.groups.{name}.roles: there is no {unknown[0]}, but {', '.join(ROLES)}")
        for key in ("match", "unless"):
            try:
                re.compile(rule.get(key, ""))
            except re.error as error:
                raise ValueError(
                    f"optimizer.groups.{name}.{key}={rule[key]} is no regular expression: {error}"
                ) from None
