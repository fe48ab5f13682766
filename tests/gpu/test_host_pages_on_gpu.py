"""Pages that go to host memory and come back are the same bits, before, while and after that memory is pinned."""

from __future__ import annotations

import threading

import pytest
import torch

from kernels.launch import Device

pytest.importorskip("safetensors")
pytest.importorskip("msgspec")

from backend.engine.plan import PageCopy
from backend.runner.host_pages import HostPages
from backend.runner.kv_pages import KvPages
from backend.runner.pinning import CudaPinner
from tests.bench.gpu.models import TOY

pytestmark = pytest.mark.gpu
NUM_PAGES = 4096
"""128 MiB of K, and as much of V: two pieces each."""
CHECKED = (0, 1, 511, 512, 1023, 1024, NUM_PAGES - 1)


class Gate:
    """CUDA's pinner, which waits before its second piece."""

    def __init__(self, device: torch.device) -> None:
        self._pinner = CudaPinner(device)
        self.is_open = threading.Event()
        self.num_pinned = 0

    def pin(self, address: int, num_bytes: int) -> None:
        if self.num_pinned:
            self.is_open.wait(60)
        self._pinner.pin(address, num_bytes)
        self.num_pinned += 1

    def unpin(self, address: int) -> None:
        self._pinner.unpin(address)
        self.num_pinned -= 1


def test_host_pages_while_they_are_pinned(device: Device, is_emulated: bool) -> None:
    if is_emulated:
        pytest.skip("pins by CUDA's runtime; tests/unit/runner/test_pinning.py has a stand-in")
    kv = KvPages(TOY, 2 * len(CHECKED), device=device.torch_device, dtype=torch.bfloat16)
    generator = torch.Generator(device.torch_device).manual_seed(0)
    expected = []
    for page in range(len(CHECKED)):
        for part in kv.page(page):
            part.normal_(generator=generator)
        expected.append([part.clone() for part in kv.page(page)])
    gate = Gate(device.torch_device)
    host = HostPages(TOY, NUM_PAGES, kv, gate)
    assert host._pinning is not None

    def go_and_come_back() -> None:
        host.run([PageCopy(page, place, True) for page, place in enumerate(CHECKED)])
        host.run([PageCopy(place, len(CHECKED) + page, False) for page, place in enumerate(CHECKED)])
        device.synchronize()
        for page, parts in enumerate(expected):
            for part, came_back in zip(parts, kv.page(len(CHECKED) + page), strict=True):
                assert torch.equal(part, came_back)
                came_back.zero_()

    go_and_come_back()
    gate.is_open.set()
    go_and_come_back()
    host._pinning.wait()
    assert gate.num_pinned > 2
    go_and_come_back()
    host.close()
    assert gate.num_pinned == 0
