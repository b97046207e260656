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
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("suite", sorted(path.stem for path in SUITE.glob("test_*.py")))
def test_the_kernels_interpreted_are_their_references(suite, which):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, str(SUITE / f"{suite}.py")]
    unchecked = {"JAXTYPING_DISABLE": "1"} if suite == "test_compilation" else {}
    environment = {**os.environ, "TRITON_INTERPRET": "1", **unchecked}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    nothing_selected = 5
    assert run.returncode in ((0, nothing_selected) if which == "slow" else (0,)), run.stdout + run.stderr
