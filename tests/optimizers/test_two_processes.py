"""Two processes that shard with FSDP2 step as one process does; the same through the platform."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.optimizers.groups import split
from lightning_modules.optimizers.mars import MARS
from lightning_modules.optimizers.parameter_free import AdaGradPP, AdamPP
from tests.parity import curve, train

SHAMPOO = {"matrices": {"roles": ["matrix"], "algo": "mars-shampoo"}, "vectors": {"roles": ["vector"], "algo": "adamw"}}
ALL = {"all": {}}
WAYS = {
    "foreach": (MARS, ALL, {"lr": 0.05, "weight_decay": 0.1}),
    "fused": (MARS, ALL, {"lr": 0.05, "weight_decay": 0.1, "fused": True}),
    "global clip": (MARS, ALL, {"lr": 0.05, "clip_scope": "global"}),
    "exact": (MARS, ALL, {"lr": 0.05, "exact": True}),
    "lion": (MARS, ALL, {"lr": 0.05, "algo": "mars-lion"}),
    "shampoo": (MARS, SHAMPOO, {"lr": 0.05}),
    "svd": (MARS, SHAMPOO, {"lr": 0.05, "orth": "svd"}),
    "adagrad_pp": (AdaGradPP, ALL, {"eta_init": 0.1}),
    "adam_pp": (AdamPP, ALL, {"eta_init": 0.1, "eta_init_mode": "rel_norm", "weight_decay": 0.1, "average": True}),
    "adam_pp case 2": (AdamPP, ALL, {"eta_init": 0.1, "case": 2}),
}
EXACT = ("lion", "shampoo")  # signs, and bfloat16
BOUND = {AdaGradPP: 5e-6, AdamPP: 5e-6, MARS: 3e-8}


def network() -> nn.Module:
    """Sizes that two processes do not share evenly, one of which leaves a process without a part."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(3, 1))


def made(net: nn.Module, way: str) -> torch.optim.Optimizer:
    make, rules, options = WAYS[way]
    own = {name: {key: value for key, value in rule.items() if key == "algo"} for name, rule in rules.items()}
    return make([{"params": p, **own[name]} for name, p in split(net, rules).items()], **options)


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[Tensor]:
    """The parameters after some steps on a loss so large that the clip is active."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator)

        def closure(x=x) -> None:
            optimizer.zero_grad()
            (100 * (net(x) - x[:, :1]).square().mean()).backward()

        optimizer.step(closure)
    return [whole(p.detach()) for p in net.parameters()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def shard(rank: int, folder: str) -> None:
    """What one of two processes does: every way of WAYS, and a state taken out and put back."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for way in WAYS:
        net = network()
        for layer in net:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        optimizer = made(net, way)
        found[way] = descend(net, optimizer)
        state = get_optimizer_state_dict(net, optimizer)
        other = made(net, way)
        set_optimizer_state_dict(net, other, state)
        for p in net.parameters():
            for name, value in optimizer.state[p].items():
                assert torch.equal(whole(value), whole(other.state[p][name])), (way, name)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, list[Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(shard, args=(str(folder),), nprocs=2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_that_shard_step_as_one(way, sharded):
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    alone = descend(net, made(net, way))
    assert all((ours - start).abs().max() > 1e-2 for ours, start in zip(alone, before))
    difference = max((ours - theirs).abs().max().item() for ours, theirs in zip(sharded[way], alone))
    print(f"{way}: {difference:.1e}")
    assert difference == 0 if way in EXACT else difference <= BOUND[WAYS[way][0]]


SMALLEST = (
    *("model=sft", "policy.width=16", "policy.layers=1", "policy.heads=2", "policy.hidden=32", "data.batch_size=8"),
    *("data.standin={sft: 64, prompts: 8, val: 4, test: 4, misconception: 0.6, slip: 0.0}", "trainer.max_steps=6"),
)
TWO = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")
# every commit trains T6 with MARS on two sharded processes (tests/language/test_t6_training.py)
NAMES = ("mars", "mars_exact", "mars_lion", "mars_shampoo", "muon", "adam_pp", "adagrad_pp")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_platform_trains_on_two_sharded_processes_as_on_one(name, tmp_path):
    curves = []
    for words in ((), TWO):
        output = tmp_path / ("two" if words else "one")
        scale = ("optimizer.eta_init=1e-3",) if name.endswith("pp") else ()
        train(output, *SMALLEST, f"optimizer={name}", *scale, *words)
        curves.append(curve(output, "sft"))
    assert curves[0][0] - curves[0][-1] > 1e-3
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
