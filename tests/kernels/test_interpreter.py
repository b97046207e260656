"""The Triton kernels are run without a GPU, by Triton's interpreter, in a process of its own."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "interpreted"


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.fixture
def interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[dev]'")
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 cannot run a loop with NumPy 2.4: pip install 'numpy<2.4'")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("suite", sorted(path.stem for path in SUITE.glob("test_*.py")))
def test_the_kernels_interpreted_are_their_references(suite):
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(SUITE / f"{suite}.py")]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
