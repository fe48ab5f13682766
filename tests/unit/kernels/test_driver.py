"""The calls that reach libcuda, through the real cuda.bindings; no GPU was there when this was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.sources import include_folders

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What driver_session.py found, and the calls that its libcuda got."""
    folder = tmp_path_factory.mktemp("fake_libcuda")
    source, library = HERE / "fake_libcuda.cpp", folder / "libcuda.so.1"
    include = f"-I{include_folders()[1]}"
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", include, source, "-o", library, "-ldl"], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_CALLS": str(folder / "calls")}
    command = [sys.executable, "-m", "tests.unit.kernels.driver_session", str(folder / "cache")]
    finished = subprocess.run(
        command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return json.loads(finished.stdout), calls


def calls_of(session: tuple[dict[str, Any], list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    return [call for call in session[1] if call["call"] == name]


def test_launch_reaches_the_driver_with_every_value(session: Any) -> None:
    found, _ = session
    first = calls_of(session, "launch")[0]
    assert first == {
        "call": "launch",
        "kernel": 0x222,
        "grid": [6, 2, 1],
        "block": [128, 2, 1],
        "shared": 0,
        "stream": 0x5EED,
        "attributes": [],
        "pointer": found["address"],
        "map": list(range(1000, 1016)),
        "map_misaligned": 0,
        "int": -7,
        "float": pytest.approx(0.1),
        "has_extra": 0,
    }


def test_cluster_and_overlap_are_launch_attributes(session: Any) -> None:
    second, third = calls_of(session, "launch")[1:3]
    # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION and ..._PROGRAMMATIC_STREAM_SERIALIZATION
    assert second["attributes"] == [[4, [2, 1, 1]], [6, 1]]
    assert (second["block"], second["shared"]) == ([32, 1, 1], 100_000)
    assert third["attributes"] == []


def test_tensor_map_is_encoded_as_asked_and_where_the_driver_wants_it(session: Any) -> None:
    found, _ = session
    encoded = calls_of(session, "encode")
    assert encoded[0] == {
        "call": "encode",
        "type": 9,  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        "address": found["address"],
        "dims": [32, 64],
        "strides": [64],
        "box": [32, 8],
        "element_strides": [1, 1],
        "interleave": 0,
        "swizzle": 2,
        "l2_promotion": 2,
        "fill": 0,
        "misaligned": 0,
    }
    assert {call["misaligned"] for call in encoded} == {0}


def test_programs_and_kernels_are_loaded_once(session: Any) -> None:
    assert [call["code"] for call in calls_of(session, "load")] == ["an image"]
    assert [call["name"] for call in calls_of(session, "kernel")] == ["copy", "other"]


def test_dynamic_shared_memory_is_asked_for_when_it_grows(session: Any) -> None:
    # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, on the device of ordinal 1; not again for less.
    assert calls_of(session, "attribute") == [
        {"call": "attribute", "attribute": 8, "value": 100_000, "kernel": 0x222, "device": 41}
    ]


def test_captured_launches_go_into_a_graph(session: Any) -> None:
    found, calls = session
    assert found["graph"] == ["begin thread_local", "end", "replay"]
    names = [call["call"] for call in calls]
    # The kernel is loaded before the first launch of the capture.
    assert names[names.index("kernel", names.index("kernel") + 1) :].count("launch") == 2
    assert "#5 replay of a graph of 2 launches\n    other (copy E=32)" in found["report"]


def test_every_thread_gets_the_context(session: Any) -> None:
    assert session[0]["bound_in"] == ["MainThread", "worker"]


def test_device_is_described(session: Any) -> None:
    assert (session[0]["torch_device"], session[0]["num_sms"]) == ("cuda:1", 132)


def test_failures_say_what_happened_and_what_was_launched(session: Any) -> None:
    found, _ = session
    refused = (
        "copy was not started: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, too many resources requested for launch\nlast 6 of 6"
    )
    assert found["refused"].startswith(refused)
    assert "#6 copy (copy E=32): grid (666, 1, 1)" in found["refused"]
    assert found["missing"] == "missing of copy E=32: CUDA_ERROR_NOT_FOUND, another error"
    assert found["synchronize"].startswith(
        "a kernel failed: CUDA error: an illegal memory access\nlast 7 of 7 launches"
    )
    assert (found["num_recorded"], found["mark_passed"]) == (2, "no error")
    assert found["mark_failed"].startswith("a kernel failed: CUDA error: an illegal memory access\nlast ")
    assert found["other_gpu"] == "the kernels are for compute capability (9, 0) (Hopper), a GPU has (8, 0)"
    assert found["no_gpu"] == "no GPU: torch sees none on this machine"
