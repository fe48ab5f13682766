"""The back end: arguments are held against the kernel's parameters, conditions are reproducible, builds are cached safely."""

from __future__ import annotations

import os
import platform
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.arguments import Access, Argument, TensorMap, float32, int32, int64
from kernels.launch import Launch
from kernels.program import Program
from tests.conftest import pytest_runtest_call
from tests.emulator import toolchain
from tests.emulator.build import Mutant, build
from tests.emulator.device import CHECKED, PLAIN, Conditions, Delivery, EmulatedDevice, EmulatorError, Schedule
from tests.emulator.mutation import Subject
from tests.emulator.subjects import FOLDER, REDUCTION, buffer, run_gather

WRONG = Program(FOLDER / "wrong.cu")


def launch(*arguments: Argument, kernel: str = "before_the_start") -> None:
    EmulatedDevice().launch(Launch(WRONG, kernel, (1, 1, 1), (1, 1, 1), arguments))


IN = buffer("in", torch.zeros(64, dtype=torch.int32), Access.READ)
OUT = buffer("out", torch.zeros(64, dtype=torch.int32), Access.WRITE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IN, OUT), "takes 3 arguments, the launch passes 2"),
        ((IN, OUT, int64("n", 0)), r"argument 2 \(n\): the launch passes .*, the kernel takes a integer of 4 bytes"),
        ((IN, OUT, float32("n", 0)), r"argument 2 \(n\): the launch passes float, the kernel takes a integer"),
        ((OUT, OUT, int32("n", 0)), r"argument 0 \(out\): the launch says WRITE, the kernel takes a pointer to const"),
        ((IN, int64("out", 0), int32("n", 0)), r"argument 1 \(out\): .*the kernel takes a pointer"),
        ((IN, OUT, IN), r"argument 2 \(in\): the launch passes a buffer, the kernel takes a integer"),
        ((TensorMap(IN, (16,), (), (16,)), OUT, int32("n", 0)), r"argument 0 \(in\): the launch passes a tensor map"),
    ],
)
def test_arguments_are_held_against_the_kernels_parameters(arguments: tuple[Argument, ...], message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        launch(*arguments)


def test_unknown_kernel() -> None:
    with pytest.raises(EmulatorError, match=r"wrong: no EXPORT_KERNEL\(nothing\) in the source"):
        launch(IN, OUT, int32("n", 0), kernel="nothing")


def test_read_only_buffer_is_never_written() -> None:
    out = replace(OUT, access=Access.READ)
    with pytest.raises(EmulatorError, match="write to buffer out, which is read-only"):
        EmulatedDevice().launch(
            Launch(WRONG, "blocks_exchange_without_fences", (1, 1, 1), (32, 1, 1), (IN, out, int32("n", 0)))
        )


def order(conditions: Conditions) -> int:
    device = EmulatedDevice(conditions)
    run_gather(device)
    assert device.num_switches > 1000
    return device.order_hash


def test_same_conditions_give_the_same_order_of_threads() -> None:
    for schedule in Schedule:
        conditions = Conditions(schedule=schedule, delivery=Delivery.RANDOM, seed=3)
        assert order(conditions) == order(conditions)


def test_other_seeds_give_other_orders() -> None:
    for schedule in (Schedule.RANDOM, Schedule.PRIORITY):
        orders = {order(Conditions(checked=False, schedule=schedule, seed=seed)) for seed in range(6)}
        assert len(orders) >= 4  # four warps have but 24 priorities


def test_checked_and_plain_runs_take_the_same_order() -> None:
    conditions = Conditions(schedule=Schedule.RANDOM, delivery=Delivery.RANDOM, seed=5)
    assert order(conditions) == order(replace(conditions, checked=False))


def test_capture_keeps_launches_and_replays_them() -> None:
    device = EmulatedDevice(PLAIN[0])
    x = torch.rand(1, 1024) + 0.5
    weight = torch.ones(1024)
    scaled, largest = torch.zeros(1, 1024), torch.zeros(1)
    arguments = (
        buffer("in", x, Access.READ),
        buffer("weight", weight, Access.CONSTANT),
        buffer("scaled", scaled, Access.WRITE),
        buffer("largest", largest, Access.WRITE),
    )
    step = Launch(Program(FOLDER / "reduction.cu"), "reduction", (1, 1, 1), (256, 1, 1), arguments)
    graph = device.capture(lambda: device.launch(step))
    assert not scaled.any()
    for _ in range(2):
        x += 1
        graph.replay()
        device.synchronize()
        torch.testing.assert_close(scaled, x / x.sum())


def test_compiler_errors_show_the_kernels_line() -> None:
    mutant = Mutant.of("no semicolon", "reduction.cu", "top = part[0];", "top = part[0]")
    with pytest.raises(toolchain.ToolchainError, match=r"reduction\.cu:\d+:\d+: error"):
        build(Program(FOLDER / "reduction.cu"), True, mutant)


def test_mutant_must_change_something() -> None:
    program = Program(FOLDER / "reduction.cu")
    with pytest.raises(ValueError, match=r"'gone': 'no such text' occurs 0 times in reduction\.cu, expected once"):
        build(program, True, Mutant.of("gone", "reduction.cu", "no such text"))
    with pytest.raises(ValueError, match=r"reduction\.cu does not include numeric\.cuh"):
        build(program, True, Mutant.of("elsewhere", "numeric.cuh", "a", "b"))
    with pytest.raises(ValueError, match="distinct"):
        Subject("twice", REDUCTION.run, (REDUCTION.mutants[0], REDUCTION.mutants[0]))


# ---- the cache


def test_whole_entries_are_reused_and_torn_ones_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "CACHE", tmp_path)
    built = []

    def make(path: Path) -> None:
        built.append(path)
        path.write_bytes(b"object")

    first = toolchain.cached("a.so", "key", make)
    assert toolchain.cached("a.so", "key", make) == first
    assert len(built) == 1
    first.write_bytes(b"obj")
    assert toolchain.cached("a.so", "key", make).read_bytes() == b"object"
    (tmp_path / "key" / "a.so.sha256").unlink()
    toolchain.cached("a.so", "key", make)
    assert len(built) == 3


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "CACHE", tmp_path)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise toolchain.ToolchainError("no")

    with pytest.raises(toolchain.ToolchainError):
        toolchain.cached("a.so", "key", fail)
    assert list((tmp_path / "key").iterdir()) == []


def test_two_builds_of_one_key_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "CACHE", tmp_path)
    both = threading.Barrier(2, timeout=60)

    def make(path: Path) -> None:
        both.wait()
        path.write_bytes(b"object")

    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(toolchain.cached("a.so", "key", make).read_bytes()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [b"object"] * 2


def test_only_what_is_unused_for_days_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "CACHE", tmp_path)

    def make(path: Path) -> None:
        path.write_bytes(b"object")

    for key in ("used", "unused"):
        toolchain.cached("a.so", key, make)
        os.utime(tmp_path / key, (0, 0))
    toolchain.cached("a.so", "used", make)
    toolchain.prune()
    assert [folder.name for folder in tmp_path.iterdir()] == ["used"]


# ---- machines that cannot


def test_other_processors_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.why_unavailable() is None
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "x86-64 only" in (toolchain.why_unavailable() or "")
    with pytest.raises(toolchain.EmulatorUnavailable, match="this machine is aarch64"):
        EmulatedDevice(CHECKED[0])


def test_a_test_that_meets_another_processor_is_skipped_by_name() -> None:
    running = pytest_runtest_call()
    next(running)
    with pytest.raises(pytest.skip.Exception, match="x86-64 only"):
        running.throw(toolchain.EmulatorUnavailable("x86-64 only"))


def test_missing_compiler_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.compiler.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        with pytest.raises(toolchain.ToolchainError, match=r"apt install g\+\+"):
            toolchain.compiler()
    finally:
        toolchain.compiler.cache_clear()
