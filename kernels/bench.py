"""Times an operation's cases on a GPU with a cold L2, beside the measured read bandwidth of that GPU.

Not yet run on hardware.
"""

from __future__ import annotations

import datetime
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import read_bandwidth
from kernels.check import check_case
from kernels.clock import Clock, GpuClock
from kernels.compiler import compiler_version
from kernels.driver import CudaDevice
from kernels.launch import Device
from kernels.op import Case, Inputs, Op


@dataclass(frozen=True)
class Timing:
    """Microseconds of one case: median, 10th and 90th percentile of `num_samples`; and what that is per second.

    `share_of_ceiling` is the time that the case takes at least, its bytes at the measured read bandwidth and its products at the
    tensor cores' rate, divided by the median.
    """

    op: str
    case: str
    num_samples: int
    median_us: float
    p10_us: float
    p90_us: float
    tb_per_s: float
    tflop_per_s: float
    share_of_ceiling: float

    def line(self) -> str:
        """One line of the table."""
        spread = f"[{self.p10_us:.2f}-{self.p90_us:.2f}]"
        return (
            f"{self.op:<16} {self.case:<24} {self.median_us:>10.2f} us {spread:<20} {self.tb_per_s:>6.3f} TB/s "
            f"{self.tflop_per_s:>8.2f} TFLOP/s {self.share_of_ceiling:>6.1%}"
        )


def bench(ops: Iterable[Op], device: CudaDevice, say: Callable[[str], None]) -> dict[str, Any]:
    """Times every case marked `is_timed`, each only after its check has passed. CheckError, LaunchError."""
    clock = GpuClock(device)
    ceiling_case = next(case for case in read_bandwidth.CASES if case.is_timed)
    ceiling = time_case(read_bandwidth.OP, ceiling_case, device, clock, bytes_per_us=None)
    say(f"read ceiling: {ceiling.tb_per_s:.3f} TB/s\n{ceiling.line()}")
    timings = [ceiling]
    for op in ops:
        for case in op.cases:
            if case.is_timed and op is not read_bandwidth.OP:
                timings.append(time_case(op, case, device, clock, bytes_per_us=ceiling.tb_per_s * 1e6))
                say(timings[-1].line())
    return {"machine": describe_machine(device), "timings": [asdict(timing) for timing in timings]}


def time_case(op: Op, case: Case, device: Device, clock: Clock, bytes_per_us: float | None) -> Timing:
    """Checks one case and times it. `bytes_per_us` None: this case is the ceiling itself. CheckError, LaunchError."""
    check_case(op, case, device)
    samples = clock.samples_us({"": captured(op, inputs_on(op, case, device), device)})
    return summarise(op, case, samples[""], bytes_per_us)


def inputs_on(op: Op, case: Case, device: Device) -> Inputs:
    """A case's inputs, there."""
    return {
        name: value.to(device.torch_device) if isinstance(value, torch.Tensor) else value
        for name, value in op.make_inputs(case, 0).items()
    }


def captured(op: Op, inputs: Inputs, device: Device) -> Callable[[], None]:
    """The replay of a graph of the launches, so that no work of the host lies between two events."""
    return device.capture(lambda: op.launch(device, **inputs)).replay


def summarise(op: Op, case: Case, samples_us: list[float], bytes_per_us: float | None) -> Timing:
    """Samples in microseconds -> what is printed and kept; `bytes_per_us` None: this case is the ceiling itself."""
    cost = op.cost(case)
    median_us = statistics.median(samples_us)
    deciles = statistics.quantiles(samples_us, n=10, method="inclusive")
    return Timing(
        op=op.name,
        case=case.name,
        num_samples=len(samples_us),
        median_us=median_us,
        p10_us=deciles[0],
        p90_us=deciles[-1],
        tb_per_s=cost.bytes / median_us / 1e6,
        tflop_per_s=cost.flops / median_us / 1e6,
        share_of_ceiling=1.0 if bytes_per_us is None else cost.floor_us(bytes_per_us) / median_us,
    )


def describe_machine(device: CudaDevice) -> dict[str, Any]:
    """What a timing is worth nothing without: GPU, clocks, driver, versions, commit and date."""
    return {
        "gpu": torch.cuda.get_device_name(device.torch_device),
        "num_sms": device.num_sms,
        "driver_and_clocks": _output(
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit",
            "--format=csv,noheader",
        ),
        "torch": torch.__version__,
        "nvrtc": compiler_version(),
        "python": platform.python_version(),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str:
    """First line of what a program says; "unknown" if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=60, check=False
    )
    return finished.stdout.partition("\n")[0] if finished.returncode == 0 else "unknown"
