"""The CUDA driver as a `Device`: loads cubins, launches on torch's current stream, captures CUDA graphs.

Uses `cuda.bindings.driver` alone. Not yet run on hardware: tested against a libcuda that records its calls.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from cuda.bindings import driver as cuda

from kernels.arguments import AlignedRoom, ArgumentArray, TensorMap
from kernels.cubin_cache import CubinCache
from kernels.errors import ContractError, LaunchError
from kernels.launch import Launch, Program
from kernels.launch_log import LaunchLog, head_line
from kernels.program import COMPUTE_CAPABILITY
from kernels.tensor_map import check_tensor_map

# More dynamic shared memory than this must be asked for, kernel by kernel.
_FREE_SHARED_BYTES = 48 * 1024

_MapType = cuda.CUtensorMapDataType
_MAP_TYPES = {
    torch.bfloat16: _MapType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float16: _MapType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    torch.float32: _MapType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    torch.int32: _MapType.CU_TENSOR_MAP_DATA_TYPE_INT32,
    torch.uint8: _MapType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    torch.int8: _MapType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    torch.float8_e4m3fn: _MapType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
}
_L2Promotion = cuda.CUtensorMapL2promotion
_L2_PROMOTIONS = {
    0: _L2Promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
    64: _L2Promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
    128: _L2Promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    256: _L2Promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
}


class Kernels:
    """Loaded kernels of one GPU: cubins are taken from the cache (compiled if they must be) and loaded once."""

    def __init__(self, ordinal: int, cache: CubinCache) -> None:
        self._device = _checked(cuda.cuDeviceGet(ordinal))
        self._cache = cache
        self._lock = threading.Lock()
        self._libraries: dict[Program, Any] = {}
        self._kernels: dict[tuple[Program, str], Any] = {}
        self._functions: dict[tuple[Program, str], Any] = {}
        self._shared_bytes: dict[tuple[Program, str], int] = {}

    def get(self, program: Program, kernel: str, shared_bytes: int) -> Any:
        """What cuLaunchKernelEx takes, allowed to use `shared_bytes` of dynamic shared memory. LaunchError, BuildError."""
        key = program, kernel
        # Without the lock first: this is on the way of every launch.
        if (function := self._functions.get(key)) is not None and self._shared_bytes[key] >= shared_bytes:
            return function
        with self._lock:
            handle = self._kernels.get(key)
            if handle is None:
                handle = _checked(
                    cuda.cuLibraryGetKernel(self._library(program), kernel.encode()), f"{kernel} of {program}"
                )
                self._kernels[key] = handle
                self._shared_bytes[key] = _FREE_SHARED_BYTES
                # A kernel's handle is a function's, says the driver; its bindings want to be told.
                self._functions[key] = cuda.CUfunction(int(handle))
            if self._shared_bytes[key] < shared_bytes:
                attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(
                    cuda.cuKernelSetAttribute(attribute, shared_bytes, handle, self._device),
                    f"{kernel} of {program}: {shared_bytes} bytes of dynamic shared memory",
                )
                self._shared_bytes[key] = shared_bytes
            return self._functions[key]

    def _library(self, program: Program) -> Any:
        if program not in self._libraries:
            image = self._cache.get(program).image
            self._libraries[program] = _checked(
                cuda.cuLibraryLoadData(image, None, None, 0, None, None, 0), f"loading {program}"
            )
        return self._libraries[program]


class CudaDevice:
    """One Hopper GPU. Its launches may come from several threads, each on its own current stream."""

    def __init__(self, torch_device: torch.device | None = None, cache: CubinCache | None = None) -> None:
        """`torch_device` default: torch's current one. LaunchError if there is no GPU, or another than a Hopper."""
        if not torch.cuda.is_available():
            raise LaunchError("no GPU: torch sees none on this machine")
        ordinal = torch.cuda.current_device() if torch_device is None else (torch_device.index or 0)
        found = torch.cuda.get_device_capability(ordinal)
        if found != COMPUTE_CAPABILITY:
            name = torch.cuda.get_device_name(ordinal)
            raise LaunchError(
                f"the kernels are for compute capability {COMPUTE_CAPABILITY} (Hopper), {name} has {found}"
            )
        self._torch_device = torch.device("cuda", ordinal)
        self._num_sms = int(torch.cuda.get_device_properties(ordinal).multi_processor_count)
        self._of_thread = _OfThread()
        self._bind_thread()
        self._kernels = Kernels(ordinal, CubinCache() if cache is None else cache)
        self._log = LaunchLog()

    @property
    def torch_device(self) -> torch.device:
        """Where the tensors of a launch must lie."""
        return self._torch_device

    @property
    def num_sms(self) -> int:
        """Streaming multiprocessors of the GPU."""
        return self._num_sms

    def launch(self, launch: Launch) -> None:
        """Starts a kernel on torch's current stream. BuildError, LaunchError, ContractError (tensor maps)."""
        if self._of_thread.captured is not None:
            self._of_thread.captured.append(launch)
            return
        self._log.add(launch)
        self._start(launch)

    def synchronize(self) -> None:
        """Waits for all streams. LaunchError with the last launches if a kernel has failed."""
        try:
            torch.cuda.synchronize(self._torch_device)
        except RuntimeError as error:
            raise LaunchError(f"a kernel failed: {error}\n{self.report()}") from error

    def mark(self) -> CudaMark:
        """An event on torch's current stream."""
        self._bind_thread()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._torch_device))
        return CudaMark(event, self)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed page-locked memory, of torch's cache of it: it goes back there when nothing refers to it any more."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def capture(self, record: Callable[[], None]) -> CudaGraph:
        """The launches that `record` makes in this thread, as a CUDA graph; they are not run."""
        launches: list[Launch] = []
        self._of_thread.captured = launches
        try:
            record()
        finally:
            self._of_thread.captured = None
        # Loading a module is not allowed while a stream is captured.
        for launch in launches:
            self._kernels.get(launch.program, launch.kernel, launch.shared_bytes)
        self._bind_thread()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._torch_device)
        stream.wait_stream(torch.cuda.current_stream(self._torch_device))
        # Not torch.cuda.graph(), which collects garbage and empties torch's cache at every capture.
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for launch in launches:
                    self._start(launch)
            finally:
                graph.capture_end()
        return CudaGraph(graph, launches, self)

    def report(self) -> str:
        """The last launches, for a crash report."""
        return self._log.report()

    def replay(self, graph: CudaGraph) -> None:
        """Starts a graph on torch's current stream. LaunchError."""
        self._log.add_replay(graph.head_lines)
        self._bind_thread()
        try:
            graph.cuda_graph.replay()
        except RuntimeError as error:
            raise LaunchError(f"a graph could not be started: {error}\n{self.report()}") from error

    def _start(self, launch: Launch) -> None:
        self._bind_thread()
        kernel = self._kernels.get(launch.program, launch.kernel, launch.shared_bytes)
        arguments = ArgumentArray(launch.arguments, encode_tensor_map)
        stream = torch.cuda.current_stream(self._torch_device).cuda_stream
        (status,) = cuda.cuLaunchKernelEx(launch_config(launch, stream), kernel, arguments.address, 0)
        if status != cuda.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{launch.kernel} was not started: {error_text(status)}\n{self.report()}")

    def _bind_thread(self) -> None:
        """Makes the GPU's context current in this thread, once: the driver launches into the current one."""
        if not self._of_thread.is_bound:
            torch.cuda.set_device(self._torch_device)
            torch.cuda.current_stream(self._torch_device).synchronize()
            self._of_thread.is_bound = True


class _OfThread(threading.local):
    """What a `CudaDevice` knows about the calling thread: whether its context is current, what is being captured."""

    def __init__(self) -> None:
        self.is_bound = False
        self.captured: list[Launch] | None = None


class CudaMark:
    """An event that was recorded."""

    def __init__(self, event: torch.cuda.Event, device: CudaDevice) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """Waits for the event. LaunchError with the last launches if a kernel has failed."""
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise LaunchError(f"a kernel failed: {error}\n{self._device.report()}") from error


class CudaGraph:
    """A captured CUDA graph; keeps the tensors of its launches alive."""

    def __init__(self, cuda_graph: torch.cuda.CUDAGraph, launches: list[Launch], device: CudaDevice) -> None:
        self.cuda_graph = cuda_graph
        self.head_lines = tuple(head_line(launch) for launch in launches)
        self._launches = launches
        self._device = device

    def replay(self) -> None:
        """Starts it on torch's current stream."""
        self._device.replay(self)


def launch_config(launch: Launch, stream: int) -> Any:
    """The driver's launch configuration, with attributes for cluster and overlap where they are asked for."""
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.block
    config.sharedMemBytes = launch.shared_bytes
    config.hStream = cuda.CUstream(stream)
    attributes = []
    if launch.cluster != (1, 1, 1):
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster = attribute.value.clusterDim
        cluster.x, cluster.y, cluster.z = launch.cluster
        attributes.append(attribute)
    if launch.overlaps_previous:
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def encode_tensor_map(tensor_map: TensorMap) -> bytes:
    """The driver's 128 bytes of a tensor map. ContractError names the broken rule; LaunchError if the driver knows another."""
    check_tensor_map(tensor_map)
    if (map_type := _MAP_TYPES.get(tensor_map.buffer.dtype)) is None:
        raise ContractError(f"tensor map of {tensor_map.name}: no tensor map has elements of {tensor_map.buffer.dtype}")
    rank = len(tensor_map.dims)
    room = AlignedRoom()
    status = _encode_function()(
        room.address,
        int(map_type),
        rank,
        tensor_map.buffer.address,
        (ctypes.c_uint64 * rank)(*tensor_map.dims),
        (ctypes.c_uint64 * rank)(*tensor_map.strides_bytes),
        (ctypes.c_uint32 * rank)(*tensor_map.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        int(cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(tensor_map.swizzle),
        int(_L2_PROMOTIONS[tensor_map.l2_promotion_bytes]),
        int(cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    _checked((cuda.CUresult(status),), f"tensor map of {tensor_map.name}")
    return room.read()


@functools.lru_cache(maxsize=1)
def _encode_function() -> Any:
    """cuTensorMapEncodeTiled through ctypes.

    The driver wants the 128 bytes at a multiple of 64; cuda.bindings 13.5 passes it a CUtensorMap of its own that lies
    anywhere.
    """
    flags = cuda.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    address, _ = _checked(cuda.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, flags), "cuTensorMapEncodeTiled")
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int,
        pointer,
        number,
        number,
        pointer,
        pointer,
        pointer,
        pointer,
        pointer,
        number,
        number,
        number,
        number,
    )
    return prototype(int(address))


def error_text(status: Any) -> str:
    """Name and description of a driver's status."""
    _, description = cuda.cuGetErrorString(status)
    return f"{status.name}, {description.decode()}" if description else str(status.name)


def _checked(result: tuple[Any, ...], what: str = "the CUDA driver") -> Any:
    status, *values = result
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"{what}: {error_text(status)}")
    return values[0] if len(values) == 1 else values
