"""The kernels compile for a Hopper GPU that is not there, and fit into it."""

import json
import os
import subprocess
import sys

import pytest

SHARED = 227 * 1024  # bytes that a block may have on sm_90


@pytest.mark.parametrize("words", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "all"])
def test_the_kernels_compile_without_spills_for_hopper(words, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[dev]'")
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", *words]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *compiled, last = (json.loads(line) for line in run.stdout.splitlines())
    assert last == {"specialisations": 1}
    for kernel in compiled:
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= SHARED, kernel
        wanted = [] if not kernel["rows"] else ["wgmma.mma_async"] if kernel["rows"] >= 64 else ["mma.sync"]
        assert kernel["matrix"] == wanted, kernel
        assert kernel["asserts"] == kernel["kernel"].startswith(("rotate", "qkv")), kernel
