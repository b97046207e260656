"""Activation checkpointing runs each layer a second time in the backward pass, and changes nothing else."""

import pytest
import torch

from lightning_modules.alignment.generation import Sampling, generate
from lightning_modules.alignment.policies import pretrained, tiny
from lightning_modules.alignment.value import ValueNetwork

IDS = torch.randint(2, 595, (5, 17), generator=torch.Generator().manual_seed(0))
MASK = torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) > 0.4


def gradients(network, loss) -> tuple[int, list[torch.Tensor]]:
    """(how often a forward and backward pass enters the first layer's MLP, the gradients)."""
    runs = []
    mlp = next(module for name, module in network.named_modules() if name.endswith("layers.0.mlp"))
    # before, not after: the recomputation leaves the layer as soon as it has what the backward pass needs
    hook = mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss(network.train()).backward()
    hook.remove()
    return len(runs), [parameter.grad for parameter in network.parameters() if parameter.requires_grad]


def policy_loss(policy) -> torch.Tensor:
    return policy(IDS, MASK).log_probs.sum()


def value_loss(value) -> torch.Tensor:
    torch.nn.init.ones_(value.head.linear.weight)
    return value(IDS).square().sum()


def test_layers_run_twice_and_gradients_are_equal():
    plain, twice = gradients(tiny(), policy_loss), gradients(tiny(checkpointing=True), policy_loss)
    assert (plain[0], twice[0]) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], twice[1], strict=True))


def test_a_value_network_of_its_own_recomputes_as_its_policy_does():
    results = [gradients(ValueNetwork(tiny(checkpointing=flag)), value_loss) for flag in (False, True)]
    assert [runs for runs, _ in results] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_adapters_learn_under_checkpointing_and_a_value_network_over_them(tmp_path):
    pytest.importorskip("peft")
    tiny().export(tmp_path / "base")
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        policy = pretrained(str(tmp_path / "base"), lora={"r": 4, "alpha": 8}, checkpointing=flag)
        results.append((*gradients(policy, policy_loss), gradients(ValueNetwork(policy), value_loss)[0]))
    assert [(policy, value) for policy, _, value in results] == [(1, 1), (2, 2)]
    assert any(gradient.any() for gradient in results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_references_and_answers_are_those_of_a_policy_without_it():
    plain, other = tiny().train(), tiny(checkpointing=True).train()
    assert torch.equal(plain.frozen()(IDS, MASK).log_probs, other.frozen()(IDS, MASK).log_probs)
    prompts = [[5, 6, 7], [8, 9]]
    sampling = Sampling(max_new=8)
    answers = [dict(generate(policy, prompts, 2, sampling, ["a", "b"], 4)) for policy in (plain, other)]
    assert answers[0] == answers[1]
