"""What tests of readers share."""

import signal

import pytest


@pytest.fixture
def _no_hang():
    """A minute for hundreds of small files, else the alarm fails the test."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a damaged file hangs the reader"))
    signal.alarm(60)
    yield
    signal.alarm(0)
