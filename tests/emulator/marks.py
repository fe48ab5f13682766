"""Marks for tests that run kernels on the CPU."""

from __future__ import annotations

import pytest

from tests.emulator.toolchain import why_unavailable

needs_emulator = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")
"""The emulator is for x86-64; a compiler that is missing is a failure, not a reason to skip."""
