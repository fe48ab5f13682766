from __future__ import annotations

import gc
import weakref

import torch

from kernels.arguments import Access, Buffer, Swizzle, TensorMap, float32
from kernels.launch import Launch, Program
from kernels.launch_log import LaunchLog, head_line


def make_launch(kernel: str, tensor: torch.Tensor) -> Launch:
    buffer = Buffer("x", tensor, Access.UPDATE, "T E", torch.float32)
    arguments = (
        buffer,
        Buffer("bias", None, Access.READ, "E", torch.float32),
        TensorMap(buffer, (8, 2), (32,), (8, 1), Swizzle.BYTES_32),
        float32("eps", 0.5),
    )
    return Launch(Program.of("op", E=8), kernel, (2, 1, 1), (32, 1, 1), arguments, overlaps_previous=True)


def test_report_tells_the_newest_launch_first_with_its_arguments() -> None:
    log = LaunchLog()
    tensor = torch.zeros(2, 8)
    launches = [make_launch(name, tensor) for name in ("first", "second")]
    log.add(launches[0])
    log.add_replay([head_line(launch) for launch in launches])
    log.add(launches[1])
    where = f"{tensor.data_ptr():#x}"
    described = "(op E=8): grid (2, 1, 1), block (32, 1, 1), cluster (1, 1, 1), 0 bytes of shared memory, overlaps the one before"
    arguments = [
        f"    x = torch.float32 [2, 8] at {where}, update",
        "    bias = none",
        f"    x = torch.float32 [2, 8] at {where}, update by dims (8, 2), strides_bytes (32,), box (8, 1), swizzle BYTES_32",
        "    eps = 0.5",
    ]
    assert log.report().splitlines() == [
        "last 3 of 3 launches, newest first:",
        f"#3 second {described}",
        *arguments,
        "#2 replay of a graph of 2 launches",
        f"    first {described}",
        f"    second {described}",
        f"#1 first {described}",
        *arguments,
    ]


def test_log_is_bounded_and_keeps_no_tensor() -> None:
    log = LaunchLog(num_kept=2)
    tensor = torch.zeros(2, 8)
    for number in range(5):
        log.add(make_launch(f"kernel_{number}", tensor))
    lines = [line for line in log.report().splitlines() if not line.startswith(" ")]
    assert lines[0] == "last 2 of 5 launches, newest first:"
    assert [line.split(" (")[0] for line in lines[1:]] == ["#5 kernel_4", "#4 kernel_3"]
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None
