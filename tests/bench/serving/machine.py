"""What the benchmark needs of a GPU: our kernels built, and its read bandwidth."""

from __future__ import annotations

from kernels import read_bandwidth
from kernels.bench import time_case
from kernels.build import build
from kernels.clock import GpuClock
from kernels.cubin_cache import CubinCache
from kernels.driver import CudaDevice
from kernels.ops import OPS


def read_ceiling(device: CudaDevice) -> float:
    """Bytes a microsecond that this GPU reads at most; builds all kernels first, so that no server has to. KernelError."""
    build([program for op in OPS for program in op.programs], CubinCache())
    case = next(case for case in read_bandwidth.CASES if case.is_timed)
    return time_case(read_bandwidth.OP, case, device, GpuClock(device), bytes_per_us=None).tb_per_s * 1e6
