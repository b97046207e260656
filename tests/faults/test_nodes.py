"""Two hosts, each with its own torchrun: network namespaces where this user may make them, two agents on one else."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TINY, without_data

import train
from tests.waiting import until

JOB = ("model=dqo", "model.value_warmup=0.2", "trainer.max_steps=30", "trainer.val_check_interval=10")
JOB += ("callbacks.checkpoint_every=5",)
PATIENCE = 300  # seconds


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@contextmanager
def hosts() -> Iterator[list[tuple[list[str], str]]]:
    """For each of two hosts: what to put before a command to run it there, and its address."""
    name = secrets.token_hex(3)
    names = [f"tessera-{name}-{number}" for number in range(2)]
    possible = shutil.which("ip") and os.geteuid() == 0 and all(ip("netns", "add", ns) for ns in names)
    if not possible:
        yield [([], "127.0.0.1")] * 2
        return
    try:
        cable = [f"v{name}{number}" for number in range(2)]
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for number, ns in enumerate(names):
            ip("link", "set", cable[number], "netns", ns, "name", "eth0")
            ip("-n", ns, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", ns, "link", "set", "eth0", "up")
            ip("-n", ns, "link", "set", "lo", "up")
        yield [(["ip", "netns", "exec", ns], f"10.77.0.{number + 1}") for number, ns in enumerate(names)]
    finally:
        for ns in names:
            ip("netns", "del", ns)


def on_two_hosts(places: list[tuple[list[str], str]], output: Path, *words: str) -> list[subprocess.Popen]:
    """Start torchrun on both, as on two nodes of a cluster."""
    port, run = 20_000 + secrets.randbelow(20_000), secrets.token_hex(4)
    agents = []
    for number, (there, address) in enumerate(places):
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={places[0][1]}:{port}", f"--rdzv-id={run}"]
        rendezvous += [f"--rdzv-conf=is_host={1 - number}", f"--local-addr={address}", "--max-restarts=1"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous]
        environment = without_data() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": "eth0"} if there else {}
        command = [*there, *torchrun, train.__file__, *TINY, *JOB, *words, f"output={output}"]
        agents.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    return agents


def finished(agents: list[subprocess.Popen]) -> list[str]:
    said = [agent.communicate(timeout=PATIENCE) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], [err[-2000:] for _, err in said]
    return [out for out, _ in said]


def table(out: str) -> str:
    return "\n".join(line.rpartition("│")[0].rpartition("│")[0] for line in out[out.index("┏") :].splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_hosts_end_as_two_processes_of_one_do_also_after_a_killed_process(trainer, tmp_path):
    layout = (f"trainer={trainer}", "trainer.accelerator=cpu")
    alone = subprocess.run(
        [sys.executable, train.__file__, *TINY, *JOB, *layout, "trainer.devices=2", f"output={tmp_path / 'one'}"],
        capture_output=True, text=True, env=without_data(), timeout=PATIENCE,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    output = tmp_path / "two"
    with hosts() as places:
        agents = on_two_hosts(places, output, *layout, "trainer.devices=1")
        until(lambda: bool(list(output.glob("dqo/*/*/checkpoints/step-000010.ckpt"))))
        workers = subprocess.run(
            ["pgrep", "-f", "--", f"-u .*train.py .*output={output}$"], capture_output=True, text=True
        )
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        outs = finished(agents)
    assert any(f"continuing from {output}/dqo" in out for out in outs)
    tables = [table(out) for out in outs if "┏" in out]
    assert tables == [table(alone.stdout)]
    weights = [next((tmp_path / name).glob("dqo/*/*/export/model.safetensors")).read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert len(list(output.glob("dqo/*/*/run.json"))) == 1
