"""Logging never stops a run, and nothing secret is left in a file."""

import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import command, without_data

SECRETS = {"HF_TOKEN": "hf_thisIsMarkedAsSecret0123456789", "WANDB_API_KEY": "0123456789abcdef" * 5}


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def carried_out(output: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    asked = command("model=sft", f"output={output}", "logger=wandb", *words)
    environment = {**without_data(), **SECRETS, **environment}
    return subprocess.run(asked, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory):
    """A run that logs to a W&B that does not answer, and another one that crashes meanwhile."""
    pytest.importorskip("wandb")
    output = tmp_path_factory.mktemp("unreachable")
    address = f"http://127.0.0.1:{closed_port()}"
    began = time.monotonic()
    done = carried_out(output / "whole", WANDB_BASE_URL=address)
    return (
        output,
        done,
        time.monotonic() - began,
        carried_out(output / "crash", "optimizer.lr=1e30", WANDB_BASE_URL=address),
    )


@pytest.mark.slow
def test_a_run_whose_wandb_does_not_answer_goes_on_offline_with_one_warning(unreachable):
    output, done, seconds, _ = unreachable
    assert done.returncode == 0, done.stderr
    assert seconds < 100  # it ends at all; without a probe W&B alone takes that long before it gives up
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: W&B")]
    assert len(warnings) == 1
    assert "does not answer" in warnings[0]
    assert "logging offline" in warnings[0]
    (metrics,) = output.glob("whole/sft/*/*/metrics.csv")
    assert len(metrics.read_text().splitlines()) >= 3
    assert len(list(output.glob("whole/sft/*/*/wandb/offline-run-*"))) == 1


def test_no_secret_is_in_any_file_also_after_a_crash(unreachable):
    output, _, _, crashed = unreachable
    assert crashed.returncode == 1
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
