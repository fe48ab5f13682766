"""The launch back end that runs kernels on the CPU: an implementation of `kernels.launch.Device`."""

from __future__ import annotations

import ctypes
import enum
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kernels.arguments import TENSOR_MAP_BYTES, Access, Argument, ArgumentArray, Buffer, Scalar, TensorMap
from kernels.errors import LaunchError
from kernels.launch import Launch, Mark, PassedMark, RecordedGraph
from kernels.program import Program
from kernels.tensor_map import check_tensor_map
from tests.emulator.build import Mutant, build, library
from tests.emulator.toolchain import EmulatorUnavailable, why_unavailable

# The state of the emulated machine is one per process.
_LOCK = threading.RLock()
_TENSOR_MAP_MAGIC = 0x70614D726F736E54


class Schedule(enum.IntEnum):
    """Which of the threads that could run does."""

    FORWARD = 0
    REVERSE = 1
    RANDOM = 2
    PRIORITY = 3


class Delivery(enum.IntEnum):
    """When asynchronous copies and wgmma happen: at once, when they are waited for, or in between."""

    EARLY = 0
    LATE = 1
    RANDOM = 2


@dataclass(frozen=True)
class Conditions:
    """Under which conditions a kernel runs: an error names them, and with the same ones it comes again.

    `checked` watches every memory access; `spurious_waits` lets mbarrier_try_wait give up early now and then.
    """

    checked: bool = True
    schedule: Schedule = Schedule.FORWARD
    delivery: Delivery = Delivery.LATE
    seed: int = 0
    spurious_waits: bool = False


# The extremes: what is wrong under one is often right under another. The checker itself does not depend on them much.
CHECKED = (
    Conditions(),
    Conditions(schedule=Schedule.REVERSE, delivery=Delivery.EARLY, seed=1),
    Conditions(schedule=Schedule.PRIORITY, delivery=Delivery.RANDOM, seed=2, spurious_waits=True),
)
PLAIN = tuple(
    Conditions(checked=False, schedule=schedule, delivery=delivery, seed=seed)
    for seed, (schedule, delivery) in enumerate(
        [
            (Schedule.FORWARD, Delivery.LATE),
            (Schedule.REVERSE, Delivery.EARLY),
            (Schedule.RANDOM, Delivery.RANDOM),
            (Schedule.PRIORITY, Delivery.LATE),
        ]
    )
)


class EmulatorError(LaunchError):
    """A kernel did something wrong, or something the emulator does not model."""


class _Options(ctypes.Structure):
    _fields_ = (
        ("schedule", ctypes.c_uint32),
        ("delivery", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("spurious_waits", ctypes.c_uint32),
        ("overlaps_previous", ctypes.c_uint32),
        ("stack_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_uint64),
        ("num_bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("constant", ctypes.c_uint32),
        ("starts_uninitialised", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("num_buffers", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("buffers", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
    )


class _Parameter(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_uint32), ("size", ctypes.c_uint32))


class _KernelTable(ctypes.Structure):
    _fields_ = (
        ("run", ctypes.c_void_p),
        ("num_parameters", ctypes.c_uint32),
        ("parameters", ctypes.POINTER(_Parameter)),
    )


_KINDS = ("pointer", "pointer to const", "integer", "floating-point number", "structure")


@cache
def _library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library()))
    loaded.emu_error.restype = ctypes.c_char_p
    loaded.emu_num_switches.restype = loaded.emu_order_hash.restype = ctypes.c_uint64
    return loaded


class EmulatedDevice:
    """Runs each launch to its end before `launch` returns. EmulatorError for what a kernel does wrong,
    EmulatorUnavailable on a machine of another kind.

    `mutant` is a mistake planted in the programs (see `tests.emulator.mutation`); `num_sms` is what launchers are told.
    """

    def __init__(self, conditions: Conditions = CHECKED[0], mutant: Mutant | None = None, num_sms: int = 4) -> None:
        if (reason := why_unavailable()) is not None:
            raise EmulatorUnavailable(reason)
        self.conditions = conditions
        self.mutant = mutant
        self._num_sms = num_sms
        self._modules: dict[Program, ctypes.CDLL] = {}
        self._recording: list[Launch] | None = None
        # Of the last launch: how often threads took turns, and a digest of the order they did it in.
        self.num_switches = 0
        self.order_hash = 0

    @property
    def torch_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def num_sms(self) -> int:
        """As given; few, because blocks run one after the other."""
        return self._num_sms

    def launch(self, launch: Launch) -> None:
        """Runs the kernel, or records it inside `capture`."""
        if self._recording is not None:
            self._recording.append(launch)
            return
        module = self._modules.get(launch.program)
        if module is None:
            module = ctypes.CDLL(str(build(launch.program, self.conditions.checked, self.mutant)))
            self._modules[launch.program] = module
        try:
            table = _KernelTable.in_dll(module, f"emu_kernel_{launch.kernel}")
        except ValueError:
            raise EmulatorError(f"{launch.program}: no EXPORT_KERNEL({launch.kernel}) in the source") from None
        _check_parameters(launch, table)
        with _LOCK:
            self._run(launch, table)

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def mark(self) -> Mark:
        """Nothing is ever under way."""
        return PassedMark()

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Any memory will do."""
        return torch.zeros(shape, dtype=dtype)

    def capture(self, record: Callable[[], None]) -> RecordedGraph:
        """A graph that replays the launches made by `record`."""
        if self._recording is not None:
            raise EmulatorError("a capture inside a capture")
        self._recording = []
        try:
            record()
            return RecordedGraph(self, self._recording)
        finally:
            self._recording = None

    def _run(self, launch: Launch, table: _KernelTable) -> None:
        buffers = [
            argument if isinstance(argument, Buffer) else argument.buffer
            for argument in launch.arguments
            if not isinstance(argument, Scalar)
        ]
        present = [buffer for buffer in buffers if buffer.tensor is not None]
        described = (_Buffer * max(1, len(present)))(*map(_describe, present))
        arguments = ArgumentArray(launch.arguments, _encode_tensor_map)
        description = _Launch(
            launch.grid,
            launch.block,
            launch.cluster,
            launch.shared_bytes,
            len(present),
            0,
            ctypes.addressof(described),
            arguments.address,
        )
        conditions = self.conditions
        options = _Options(
            conditions.schedule,
            conditions.delivery,
            conditions.checked,
            conditions.spurious_waits,
            launch.overlaps_previous,
            64 << 10,
            conditions.seed,
        )
        emulator = _library()
        failed = emulator.emu_launch(ctypes.byref(table), ctypes.byref(description), ctypes.byref(options))
        self.num_switches, self.order_hash = emulator.emu_num_switches(), emulator.emu_order_hash()
        if failed:
            raise EmulatorError(f"{launch.kernel}: {emulator.emu_error().decode(errors='replace')}")


def _describe(buffer: Buffer) -> _Buffer:
    return _Buffer(
        buffer.name.encode(),
        buffer.address,
        buffer.num_bytes,
        buffer.access.writes,
        buffer.access is Access.CONSTANT,
        buffer.access is Access.WRITE,
        0,
    )


def _encode_tensor_map(tensor_map: TensorMap) -> bytes:
    """The emulator's own layout (native/machine.h): nothing outside of it may look into a tensor map."""
    check_tensor_map(tensor_map)

    def padded(values: Sequence[int], count: int) -> list[int]:
        return [*values, *[0] * (count - len(values))]

    encoded = struct.pack(
        "<QQ4I5I5I4Q",
        _TENSOR_MAP_MAGIC,
        tensor_map.buffer.address,
        len(tensor_map.dims),
        tensor_map.element_bytes,
        int(tensor_map.swizzle),
        0,
        *padded(tensor_map.dims, 5),
        *padded(tensor_map.box, 5),
        *padded(tensor_map.strides_bytes, 4),
    )
    return encoded.ljust(TENSOR_MAP_BYTES, b"\0")


def _check_parameters(launch: Launch, table: _KernelTable) -> None:
    """The array a launch passes has no types: here they are known, so they are compared."""
    if table.num_parameters != len(launch.arguments):
        raise EmulatorError(
            f"{launch.kernel}: takes {table.num_parameters} arguments, the launch passes {len(launch.arguments)}"
        )
    for index, argument in enumerate(launch.arguments):
        parameter = table.parameters[index]
        if (problem := _mismatch(argument, _KINDS[parameter.kind], parameter.size)) is not None:
            raise EmulatorError(f"{launch.kernel}: argument {index} ({argument.name}): {problem}")


def _mismatch(argument: Argument, kind: str, size: int) -> str | None:
    match argument:
        case Buffer():
            if not kind.startswith("pointer"):
                return f"the launch passes a buffer, the kernel takes a {kind}"
            if argument.access.writes and kind == "pointer to const":
                return f"the launch says {argument.access.name}, the kernel takes a pointer to const"
        case TensorMap():
            if kind != "structure" or size != TENSOR_MAP_BYTES:
                return f"the launch passes a tensor map, the kernel takes a {kind} of {size} bytes"
        case Scalar():
            real = argument.ctype is ctypes.c_float
            if kind != ("floating-point number" if real else "integer") or size != ctypes.sizeof(argument.ctype):
                return f"the launch passes {argument.ctype.__name__[2:]}, the kernel takes a {kind} of {size} bytes"
    return None
