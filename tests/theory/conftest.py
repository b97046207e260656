"""What tests of simulations share."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def say(told, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`say("model=kl_ucb", ...)` in this process into the folder of the test: exit status and stderr."""
    return lambda *words: told(f"output={tmp_path}", *words)
