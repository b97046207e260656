"""The network sharded with FSDP2 over two processes is the network of one, and its compiled form the plain one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.language.sampling import generate
from tests.language.compiled import compiles_whole_and_once
from tests.language.test_gpt2 import VARIANTS, tokens, toy, trained_like


def in_processes(count: int, call: str) -> list[int]:
    """What `count` processes return that call a function of this file with their number as last argument."""
    name, arguments = call.rstrip(")").split("(")
    code = f"import sys; from tests.language.test_gpt2_sharded import {name}; {name}({arguments}, int(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error:FSDP2-wrapped module", "-c", code]
    started = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(count)]
    return [process.wait(120) for process in started]


def trained(network, rows: slice) -> list[torch.Tensor]:
    """The loss of some clipped steps on these rows of a batch."""
    ids, targets = tokens(4)
    # not Adam: the gradient of a key's bias is zero but for rounding, of which Adam would make whole steps
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(3):
        loss = network(ids[rows], targets[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def check_sharded(folder: str, rank: int) -> None:
    """One process of two: trains its rows as one process trains all of them, and generates the same."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("gpt2", "modern"):
        plain, network = (trained_like(toy(**VARIANTS[name], loss_chunk=8)) for _ in range(2))
        expected = trained(plain, slice(None))
        for unit in network.shard_units():
            fully_shard(unit)
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        losses = torch.stack(trained(network, slice(2 * rank, 2 * rank + 2)))
        dist.all_reduce(losses)
        assert (losses / 2).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-6)
        for ours, theirs in zip(network.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-6, atol=1e-6)
        ids, _ = tokens(2, 30)
        assert torch.equal(generate(network, ids, 5, temperature=0.0), generate(plain, ids, 5, temperature=0.0))
        assert network.flops_per_token(32) == plain.flops_per_token(32)
    check_written(network=trained_like(toy()), folder=f"{folder}/export", rank=rank)
    dist.destroy_process_group()


def check_written(network, folder: str, rank: int) -> None:
    """A sharded network is written whole, by one of the processes."""
    from lightning_modules.language.hf_gpt2 import load, save

    ids, _ = tokens()
    expected = network(ids)[..., :97]
    for unit in network.shard_units():
        fully_shard(unit)
    save(network, folder, writes=rank == 0)
    dist.barrier()
    torch.testing.assert_close(load(folder)(ids), expected, rtol=1e-5, atol=1e-5)


def test_two_processes_are_one(tmp_path):
    assert in_processes(2, f"check_sharded({str(tmp_path)!r})") == [0, 0]


@pytest.mark.parametrize("name", ["gpt2", pytest.param("modern", marks=pytest.mark.slow)])
def test_the_network_compiles_whole_and_once(name):
    assert compiles_whole_and_once("gpt2", **VARIANTS[name], loss_chunk=20)
