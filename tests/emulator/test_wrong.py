"""Each kernel of wrong.cu is stopped, with a message that says what is wrong and where."""

from __future__ import annotations

import re

import pytest
import torch

from kernels.arguments import Access, int32
from kernels.launch import Launch
from kernels.program import Program
from tests.emulator.build import exported_kernels
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice, EmulatorError
from tests.emulator.subjects import FOLDER, buffer

WRONG = Program(FOLDER / "wrong.cu")
MESSAGES = {
    "atomic_meets_plain_read": "data race: (plain read of|atomic operation on) a value another agent (changes|reads).*buffer out",
    "blocks_exchange_without_fences": "data race: read of a value another agent writes.*of block",
    "bulk_store_meets_read": "data race: (read of|write over) a value another agent (writes|still reads).*buffer out",
    "before_the_start": "out-of-bounds global write of 4 bytes: 4 bytes before the start of buffer out",
    "null_pointer": "out-of-bounds global write of 4 bytes: a null pointer",
    "misaligned_word": "misaligned access of 4 bytes",
    "unmapped_memory": "out-of-bounds global write of 4 bytes: a null pointer",
    "division_by_zero": "integer division by zero",
    "too_much_local_memory": "stack overflow: more than 64 KiB of local memory",
    "local_memory_of_another": "access to the local memory of another thread",
    "too_much_static": "more than 49152 bytes of static shared memory",
    "too_much_in_all": "more than 232448 bytes of shared memory, static and dynamic",
    "under_aligned_dynamic": "is not aligned to its 16 bytes",
    "asks_for_active_lanes": "pass masks explicitly",
    "mask_without_the_caller": "lane (16|31) calls with mask 0000ffff, which leaves it out",
    "lane_outside_of_the_mask": "reads lane 20, which does not take part",
    "barrier_for_half_a_warp": "48 threads, expected a multiple of 32 up to the block's 128",
    "barrier_for_too_many": "256 threads, expected a multiple of 32 up to the block's 128",
    "registers_out_of_range": "16 registers, expected a multiple of 8 from 24 to 256",
    "matrix_in_half_a_warp": "deadlock|needs all 32 lanes",
    "never_waits_for_the_kernel_before": "never calls griddep_wait",
    "barrier_not_initialised": "mbarrier at shared array b, byte 0 of 8 is not initialised",
    "barrier_initialised_twice": "initialised twice",
    "barrier_overwritten": "was overwritten",
    "too_many_bytes_expected": "the byte count leaves its range",
    "load_nobody_waits_for": "the block ends with a bulk load that nobody waited for",
    "bulk_load_of_odd_size": "120 bytes, expected a multiple of 16",
    "load_over_ordinary_writes": "async-proxy write over ordinary writes without fence_proxy_async",
    "copies_nobody_waits_for": "ends with cp.async copies it has not waited for",
    "store_reuses_its_memory": "data race: write over a value another agent still reads.*a bulk store",
    "not_a_tensor_map": "is no tensor map",
    "accumulators_touched_in_flight": "accumulator register 0 was written while wgmma was in flight",
    "warps_disagree": "the threads of the warpgroup disagree",
    "operand_not_fenced": "async-proxy read of ordinary writes without fence_proxy_async",
    "operand_overwritten_by_another_warp": "data race: write over a value another agent still reads.*wgmma of warp",
}
OVERLAPPING = {"never_waits_for_the_kernel_before"}


def launch(kernel: str, conditions: Conditions) -> None:
    given, out = torch.ones(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    arguments = (buffer("in", given, Access.READ), buffer("out", out, Access.UPDATE), int32("n", 0))
    shared_bytes = 200 * 1024 if kernel == "too_much_in_all" else 16 * 1024
    device = EmulatedDevice(conditions)
    overlaps = kernel in OVERLAPPING
    grid, block = (2, 1, 1), (128, 1, 1)
    device.launch(Launch(WRONG, kernel, grid, block, arguments, shared_bytes=shared_bytes, overlaps_previous=overlaps))


@pytest.mark.parametrize("conditions", CHECKED, ids=["forward", "reverse", "priority"])
@pytest.mark.parametrize("kernel", MESSAGES)
def test_wrong_kernel_is_stopped(kernel: str, conditions: Conditions) -> None:
    with pytest.raises(EmulatorError, match=re.compile(MESSAGES[kernel], re.DOTALL)):
        launch(kernel, conditions)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("unmapped_memory", r"^unmapped_memory: wrong\.cu:\d+: access to unmapped memory at 0xfa0 \[block"),
        ("division_by_zero", r"^division_by_zero: wrong\.cu:\d+: integer division by zero"),
        ("too_much_local_memory", r"^too_much_local_memory: wrong\.cu:\d+: stack overflow"),
    ],
)
def test_faults_of_the_plain_build_are_messages_too(kernel: str, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        launch(kernel, PLAIN[0])


def test_every_wrong_kernel_is_tried() -> None:
    assert set(exported_kernels(WRONG)) == set(MESSAGES)


def test_message_says_where_and_under_which_conditions() -> None:
    with pytest.raises(EmulatorError) as caught:
        launch("before_the_start", CHECKED[0])
    source = (FOLDER / "wrong.cu").read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(source) if text.startswith("WRONG(before_the_start)"))
    assert str(caught.value).startswith(f"before_the_start: wrong.cu:{line}: out-of-bounds global write")
    assert "[block (0,0,0), thread 0 = (0,0,0); schedule=forward, delivery=late, seed=0]" in str(caught.value)


def test_right_launch_follows_a_wrong_one() -> None:
    """An error leaves fibers in the middle of everything; the next launch must not feel it."""
    from tests.emulator.subjects import GEMM, REDUCTION

    for subject in (GEMM, REDUCTION):
        for kernel in ("warps_disagree", "load_nobody_waits_for"):
            with pytest.raises(EmulatorError):
                launch(kernel, CHECKED[2])
            subject.run(EmulatedDevice(CHECKED[0]))
