"""Every public shape is checked while the tests run: jaxtyping annotations through beartype, free at run time."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["lightning_modules", "datamodules"], "beartype.beartype").__enter__()
torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def _environment_given_back():
    """Lightning's and our launcher leave variables behind that the processes of a later test would take for theirs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
