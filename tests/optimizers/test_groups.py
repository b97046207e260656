"""Which options are for which parameters."""

import functools

import pytest
import torch
from torch import nn

from lightning_modules.optimizers.groups import DEFAULT, options, roles, split, table, without_rules


class Network(nn.Module):
    """A tied head, a convolution, vectors and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.table = nn.Embedding(6, 4)
        self.head.weight = self.table.weight
        self.convolution = nn.Conv1d(4, 4, 3)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.inner = nn.Linear(4, 4)


def names(network: nn.Module, found: dict[str, list[nn.Parameter]]) -> dict[str, list[str]]:
    known = {id(p): name for name, p in network.named_parameters()}
    return {group: [known[id(p)] for p in parameters] for group, parameters in found.items()}


def test_roles_follow_the_module_and_the_axes():
    assert roles(Network()) == {
        "norm.weight": "vector",
        "norm.bias": "vector",
        "head.weight": "embedding",
        "convolution.weight": "kernel",
        "convolution.bias": "vector",
        "inner.weight": "matrix",
        "inner.bias": "vector",
    }


def test_without_rules_there_are_matrices_and_vectors_in_the_order_of_the_network():
    network = Network()
    trained = [p for p in network.parameters() if p.requires_grad]
    found = split(network, DEFAULT)
    for ours, theirs in (
        (found["matrices"], [p for p in trained if p.ndim >= 2]),
        (found["vectors"], [p for p in trained if p.ndim < 2]),
    ):
        assert len(ours) == len(theirs)
        assert all(a is b for a, b in zip(ours, theirs))


def test_rules_go_by_role_and_by_name():
    network = Network()
    rules = {
        "inner": {"match": "^inner"},
        "norms": {"roles": ["vector"], "match": "norm"},
        "rest": {"unless": "^inner|norm"},
    }
    assert names(network, split(network, rules)) == {
        "inner": ["inner.weight", "inner.bias"],
        "norms": ["norm.weight", "norm.bias"],
        "rest": ["head.weight", "convolution.weight", "convolution.bias"],
    }


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"matrices": {"roles": ["matrix"]}}, r"norm\.weight \(vector\) is taken by no rule .*\(matrices\)"),
        ({"all": {}, "inner": {"match": "inner"}}, r"inner\.weight \(matrix\) is taken by all and inner"),
        ({"all": {"roles": ["matrices"]}}, r"groups\.all\.roles: there is no matrices, but matrix, vector"),
        ({"all": {"match": "("}}, r"groups\.all\.match=\( is no regular expression"),
    ],
)
def test_parameters_without_or_with_two_rules_are_refused_by_name(rules, said):
    with pytest.raises(ValueError, match=said):
        split(Network(), rules)


def test_the_multiplier_is_of_the_learning_rate_of_the_network():
    rule = {"roles": ["vector"], "match": "x", "lr_mult": 0.5, "algo": "adamw"}
    assert options(rule, 0.1) == {"algo": "adamw", "lr": 0.05}
    assert options({"unless": "x", "weight_decay": 0.0}, 0.1) == {"weight_decay": 0.0}
    with pytest.raises(ValueError, match="lr_mult"):
        options(rule, None)


def test_the_rules_are_taken_out_of_the_partial():
    make, rules = without_rules(functools.partial(torch.optim.AdamW, lr=0.1, groups={"all": {}}))
    assert rules == {"all": {}}
    assert make.keywords == {"lr": 0.1}
    assert without_rules(torch.optim.AdamW) == (torch.optim.AdamW, {})


def test_the_table_has_a_row_for_each_group():
    network = Network()
    groups = [{"params": p, "group": name} for name, p in split(network, DEFAULT).items()]
    shown = table(torch.optim.AdamW(groups, lr=0.1).param_groups)
    assert shown.row_count == 2
    assert list(shown.columns[2].cells) == ["88", "16"]
