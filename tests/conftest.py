"""Every public shape is checked while the tests run: jaxtyping annotations through beartype, free at run time."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook


def _typed_kernels() -> list[str]:
    """The modules of `kernels` that hold no Triton source, which is no Python that a checker could run."""
    root = Path(__file__).parents[1]
    paths = [path for path in root.glob("kernels/**/*.py") if path.name not in ("kernels.py", "__init__.py")]
    return [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]


install_import_hook(["lightning_modules", "datamodules", *_typed_kernels()], "beartype.beartype").__enter__()
torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def _environment_given_back():
    """Lightning's and our launcher leave variables behind that the processes of a later test would take for theirs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def told(monkeypatch, capfd) -> Callable[..., tuple[int, str]]:
    """`told("model=sft", ...)` is `train.py` in this process: its exit status and what stood on stderr."""
    import train

    def told(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        capfd.readouterr()
        status = 0
        try:
            train.main()
        except SystemExit as leaving:
            status = leaving.code
        return status, capfd.readouterr().err

    return told
