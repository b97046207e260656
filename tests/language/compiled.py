"""A network compiled is the network: looked at in a process of its own, as no compiler follows the check of shapes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from lightning_modules.language.sampling import generate
from tests.language.test_gpt2 import tokens, trained_like


def compiles_whole_and_once(family: str, **options) -> bool:
    """Whether `check` passes for the `toy` of a test file, gpt2 or t6, with these options."""
    code = f"from tests.language import compiled, test_{family} as family; compiled.check(family.toy, **{options!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path]), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, timeout=120).returncode == 0


def check(toy, **options) -> None:
    """One graph for all steps of training, with the gradients of the plain network; generation adds none."""
    plain, network, graphs = trained_like(toy(**options)), trained_like(toy(**options)), []
    network.compile(backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    for seed in range(3):
        ids, targets = tokens(seed=seed)
        ours, theirs = network(ids, targets), plain(ids, targets)
        torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    for one, other in zip(network.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(generate(network, ids, 3, temperature=0.0), generate(plain, ids, 3, temperature=0.0))
    assert len(graphs) == 1
    assert network.state_dict().keys() == plain.state_dict().keys()
