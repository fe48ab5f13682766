"""Host pages are pinned beside serving, in pieces that no copy crosses, and unpinned at the end."""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.weights import allocate_weights
from backend.engine.plan import PageCopy
from backend.runner import pinning
from backend.runner.host_pages import HostPages
from backend.runner.kv_pages import KvPages
from backend.runner.pinning import Pinning, pinnable
from backend.runner.torch_runner import TorchRunner
from kernels.errors import LaunchError
from tests.bench.gpu.host_only_device import HostOnlyDevice
from tests.bench.gpu.models import FP8, TOY, runner_of
from tests.checkpoints import make_checkpoint

PIECE_BYTES = 4 * mmap.PAGESIZE


class StandIn:
    """What is pinned, by address; `is_open` lets it pin; from the `last`-th piece on it cannot."""

    def __init__(self, last: int | None = None) -> None:
        self.pinned: dict[int, int] = {}
        self.is_open = threading.Event()
        self.is_asked = threading.Event()
        self._last = last

    def pin(self, address: int, num_bytes: int) -> None:
        self.is_asked.set()
        self.is_open.wait(60)
        if len(self.pinned) == self._last:
            raise RuntimeError("out of what can be pinned")
        assert address not in self.pinned
        self.pinned[address] = num_bytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_PIECE_BYTES", PIECE_BYTES)


@pytest.mark.parametrize("unit_bytes", [512, 3 * 1024, mmap.PAGESIZE, 3 * mmap.PAGESIZE, 8 * mmap.PAGESIZE])
def test_pieces_cover_all_and_end_between_copies(unit_bytes: int) -> None:
    memory = [pinnable(50 * unit_bytes + 37 * mmap.PAGESIZE * unit_bytes // 1024) for _ in range(2)]
    pinner = StandIn()
    pinner.is_open.set()
    Pinning(memory, unit_bytes, pinner).wait()
    for part in memory:
        first = part.data_ptr()
        while first < part.data_ptr() + part.nbytes:
            assert first % mmap.PAGESIZE == 0, "two pieces share a page of the system"
            assert (first - part.data_ptr()) % unit_bytes == 0, "a copy crosses the beginning of a piece"
            first += pinner.pinned.pop(first)
        assert first == part.data_ptr() + part.nbytes
    assert not pinner.pinned


def test_nothing_waits_and_all_is_unpinned_at_the_end() -> None:
    pinner = StandIn()
    made = Pinning([pinnable(100 * PIECE_BYTES)], mmap.PAGESIZE, pinner)
    assert pinner.is_asked.wait(60), "begins by itself"
    threading.Timer(0.1, pinner.is_open.set).start()
    made.close()
    assert not pinner.pinned


def test_what_cannot_be_pinned_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pinner = StandIn(last=3)
    pinner.is_open.set()
    with caplog.at_level(logging.INFO, "nemo.engine"):
        made = Pinning([pinnable(10 * PIECE_BYTES)], mmap.PAGESIZE, pinner)
        made.wait()
    assert [record.message for record in caplog.records] == [
        "host pages: only 3 of 10 pieces could be pinned, copies of the others hold up the host: out of what can be pinned"
    ]
    made.close()
    assert not pinner.pinned


def test_no_copy_of_a_page_lies_in_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    config: ModelConfig = TOY
    kv = KvPages(config, 2, device=torch.device("cpu"), dtype=torch.bfloat16)
    pinner = StandIn()
    pinner.is_open.set()
    host = HostPages(config, 9, kv, pinner)
    copied: list[tuple[int, int]] = []
    copy = torch.Tensor.copy_

    def recorded(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
        copied.append((target.data_ptr(), target.nbytes))
        return copy(target, source, non_blocking=non_blocking)

    assert host._pinning is not None
    host._pinning.wait()
    monkeypatch.setattr(torch.Tensor, "copy_", recorded)
    host.run([PageCopy(1, page, True) for page in range(9)])
    assert len(copied) == 9 * 2 * config.num_layers
    for address, num_bytes in copied:
        (piece,) = [first for first, size in pinner.pinned.items() if first <= address < first + size]
        assert address + num_bytes <= piece + pinner.pinned[piece]
    host.close()
    assert not pinner.pinned


class FailedDevice(HostOnlyDevice):
    """A kernel of it has failed."""

    def synchronize(self) -> None:
        raise LaunchError("a kernel failed")


def test_a_kernel_that_failed_leaves_nothing_pinned() -> None:
    device = FailedDevice()
    weights = allocate_weights(TOY, device.torch_device, FP8)
    runner = runner_of(TOY, weights, device, num_pages=2, max_num_seqs=1, max_model_len=64, max_step_tokens=16)
    pinner = StandIn()
    pinner.is_open.set()
    runner._host_pages = HostPages(TOY, 9, runner.kv, pinner)
    kv = weakref.ref(runner.kv)
    with pytest.raises(LaunchError, match="a kernel failed"):
        runner.close()
    assert not pinner.pinned
    assert kv() is None


def test_a_gpu_that_failed_under_torch_leaves_nothing_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TorchRunner(
        make_checkpoint(tmp_path), num_pages=2, max_num_seqs=1, max_model_len=64, num_threads=1, device="cpu"
    )
    pinner = StandIn()
    pinner.is_open.set()
    kv = KvPages(runner.config, 2, device=torch.device("cpu"), dtype=torch.bfloat16)
    runner._host_pages = HostPages(runner.config, 9, kv, pinner)
    runner._placement = replace(runner._placement, device=torch.device("cuda"))

    def synchronize(device: torch.device) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        runner.close()
    assert not pinner.pinned
    assert not hasattr(runner, "_transformer")
