"""Settings that all tests share."""

from __future__ import annotations

import signal
from collections.abc import Generator

import hypothesis
import pytest

from tests.emulator.toolchain import EmulatorUnavailable

# How long one example takes says nothing on two cores that also run a server.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

# A shell starts what it puts into the background with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Kernels are emulated on x86-64 only: a test that needs it elsewhere is skipped and says so."""
    try:
        return (yield)
    except EmulatorUnavailable as unavailable:
        pytest.skip(str(unavailable))
