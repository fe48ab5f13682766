"""What a launch is besides its kernel: graphs, overlap of dependent kernels, streams, refusals, reports of failures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import read_bandwidth, rmsnorm
from kernels.arguments import Access, Buffer, int32
from kernels.compiler import Cubin
from kernels.cubin_cache import CubinCache
from kernels.driver import CudaDevice
from kernels.errors import LaunchError
from kernels.guarded import as_bytes
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Inputs

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
NORM = Case("chain", {"M": 16, "E": 5120}, {"add": True, "quant": 0})
CHAIN_LENGTH = 8


def chain_inputs(device: Device) -> Inputs:
    return {
        name: value.to(device.torch_device) if isinstance(value, torch.Tensor) else value
        for name, value in rmsnorm.make_inputs(NORM, 0).items()
    }


def run_chain(device: Device, inputs: Inputs) -> None:
    """Norms that each read what the one before wrote, by turns in two buffers, and may start before it has ended."""
    first, second = inputs["x"], inputs["out"]
    for _ in range(CHAIN_LENGTH):
        rmsnorm.rmsnorm(device, **inputs | {"x": first, "out": second})
        first, second = second, first


def outcome(device: Device, inputs: Inputs) -> torch.Tensor:
    device.synchronize()
    return torch.cat([as_bytes(inputs[name].cpu()) for name in ("x", "out", "residual")])


def expected_outcome(device: Device) -> torch.Tensor:
    """The chain with a wait after every kernel."""
    inputs = chain_inputs(device)
    first, second = inputs["x"], inputs["out"]
    for _ in range(CHAIN_LENGTH):
        rmsnorm.rmsnorm(device, **inputs | {"x": first, "out": second})
        device.synchronize()
        first, second = second, first
    return outcome(device, inputs)


def test_kernels_that_overlap_wait_for_what_they_read(device: Device) -> None:
    expected = expected_outcome(device)
    for _ in range(20):
        inputs = chain_inputs(device)
        run_chain(device, inputs)
        assert torch.equal(outcome(device, inputs), expected)


def test_a_graph_gives_the_same_bits_at_every_replay(device: Device) -> None:
    expected = expected_outcome(device)
    inputs = chain_inputs(device)
    start = {name: inputs[name].clone() for name in ("x", "out", "residual")}
    graph = device.capture(lambda: run_chain(device, inputs))
    device.synchronize()
    assert torch.equal(inputs["residual"], start["residual"]), "capturing has run the kernels"
    for _ in range(5):
        for name, tensor in start.items():
            inputs[name].copy_(tensor)
        graph.replay()
        assert torch.equal(outcome(device, inputs), expected)


def test_a_launch_goes_to_the_current_stream(device: Device, is_emulated: bool) -> None:
    if is_emulated:
        pytest.skip("the CPU has no streams")
    stream = torch.cuda.Stream()
    data = torch.zeros(1 << 26, dtype=torch.int32, device=device.torch_device)
    sums = torch.empty(264, dtype=torch.int32, device=device.torch_device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for value in range(1, 21):
            # On another stream this would be overtaken, or would overtake.
            data.fill_(value)
            read_bandwidth.read_bandwidth(device, data=data, sums=sums)
            total = sums.sum(dtype=torch.int64) % 2**32
            assert int(total) == value * len(data) % 2**32


def test_what_the_driver_refuses_is_reported(device: Device, is_emulated: bool, tmp_path: Path) -> None:
    if is_emulated:
        pytest.skip("the driver is what refuses")
    source = tmp_path / "wide.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(128) wide(int* out, int n) { out[threadIdx.x] = n; }\n'
    )
    out = torch.zeros(256, dtype=torch.int32, device=device.torch_device)
    arguments = (Buffer("out", out, Access.WRITE, "256", torch.int32), int32("n", 7))
    with pytest.raises(LaunchError, match=r"wide was not started: CUDA_ERROR[\s\S]*out = torch.int32 \[256\] at 0x"):
        device.launch(Launch(Program(source), "wide", (1, 1, 1), (256, 1, 1), arguments))


def test_a_kernel_that_fails_is_reported_with_its_arguments(is_emulated: bool, tmp_path: Path) -> None:
    if is_emulated:
        pytest.skip("a fault of the GPU is what is reported")
    source = tmp_path / "stray.cu"
    source.write_text('extern "C" __global__ void stray(int* out) { *(int*)16 = 1; }\n')
    session = f"""
import pathlib, torch
from kernels.arguments import Access, Buffer
from kernels.driver import CudaDevice
from kernels.errors import LaunchError
from kernels.launch import Launch, Program
device = CudaDevice()
out = torch.zeros(4, dtype=torch.int32, device="cuda")
buffer = Buffer("out", out, Access.WRITE, "4", torch.int32)
try:
    device.launch(Launch(Program(pathlib.Path({str(source)!r})), "stray", (1, 1, 1), (1, 1, 1), (buffer,)))
    device.synchronize()
except LaunchError as error:
    print(error)
"""
    # In a process of its own: a fault spoils the context.
    finished = subprocess.run([sys.executable, "-c", session], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "a kernel failed: " in finished.stdout, finished.stderr
    assert "#1 stray (stray): grid (1, 1, 1)" in finished.stdout
    assert "out = torch.int32 [4] at 0x" in finished.stdout


def test_a_second_process_compiles_nothing(is_emulated: bool, tmp_path: Path) -> None:
    if is_emulated:
        pytest.skip("the emulator has a cache of its own")

    def fail(program: Program) -> Cubin:
        raise AssertionError(f"{program} was compiled again")

    for device in (CudaDevice(cache=CubinCache(tmp_path)), CudaDevice(cache=CubinCache(tmp_path, fail))):
        rmsnorm.rmsnorm(device, **chain_inputs(device))
        device.synchronize()
