"""The device of every test here: a GPU; with --emulated the emulator, which shows that the tests themselves work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels.driver import CudaDevice
from kernels.launch import Device
from tests.emulator.device import PLAIN, EmulatedDevice


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated", action="store_true", help="run on the emulator instead of a GPU")


@pytest.fixture(scope="session")
def is_emulated(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--emulated"))


@pytest.fixture(scope="session")
def device(is_emulated: bool) -> Iterator[Device]:
    device: Device = EmulatedDevice(PLAIN[0]) if is_emulated else CudaDevice()
    yield device
    device.synchronize()
