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
from kernels.compiler import compiler_version
from kernels.driver import CudaDevice
from kernels.op import Case, Op

NUM_WARM_UP = 5
NUM_SAMPLES = 50
# Read between samples: several times the 50 MB of L2, and long enough to hide the host's work for the next sample.
FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Timing:
    """Microseconds of one case: median, 10th and 90th percentile of `num_samples`; and what that is per second.

    `share_of_ceiling` is the time that the case's bytes take at the measured read bandwidth, divided by the median.
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
    ceiling_case = next(case for case in read_bandwidth.CASES if case.is_timed)
    check_case(read_bandwidth.OP, ceiling_case, device)
    flush = _flusher(device)
    ceiling = time_case(read_bandwidth.OP, ceiling_case, device, flush, bytes_per_us=None)
    say(f"read ceiling: {ceiling.tb_per_s:.3f} TB/s\n{ceiling.line()}")
    timings = [ceiling]
    for op in ops:
        for case in op.cases:
            if case.is_timed and op is not read_bandwidth.OP:
                check_case(op, case, device)
                timings.append(time_case(op, case, device, flush, bytes_per_us=ceiling.tb_per_s * 1e6))
                say(timings[-1].line())
    return {"machine": describe_machine(device), "timings": [asdict(timing) for timing in timings]}


def time_case(op: Op, case: Case, device: CudaDevice, flush: Callable[[], None], bytes_per_us: float | None) -> Timing:
    """Times one case as a graph of its launches, so that no work of the host lies between two events."""
    inputs = {
        name: value.to(device.torch_device) if isinstance(value, torch.Tensor) else value
        for name, value in op.make_inputs(case, 0).items()
    }
    graph = device.capture(lambda: op.launch(device, **inputs))
    events = []
    for _ in range(NUM_WARM_UP + NUM_SAMPLES):
        flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    device.synchronize()
    return summarise(op, case, [1000 * start.elapsed_time(end) for start, end in events[NUM_WARM_UP:]], bytes_per_us)


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
        share_of_ceiling=1.0 if bytes_per_us is None else cost.bytes / bytes_per_us / median_us,
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


def _flusher(device: CudaDevice) -> Callable[[], None]:
    """Reads other memory through L2: reading leaves nothing that must be written back while a sample runs."""
    memory = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device.torch_device)
    sums = torch.empty(2 * device.num_sms, dtype=torch.int32, device=device.torch_device)
    return device.capture(lambda: read_bandwidth.read_bandwidth(device, data=memory, sums=sums)).replay


def _output(*command: str) -> str:
    """First line of what a program says; "unknown" if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=60, check=False
    )
    return finished.stdout.partition("\n")[0] if finished.returncode == 0 else "unknown"
