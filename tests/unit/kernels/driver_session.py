"""What `test_driver.py` looks at, in a process of its own whose libcuda is `fake_libcuda.cpp`: prints one JSON object.

torch's part of a GPU (streams, graphs, properties) is replaced here; everything below goes through cuda.bindings.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from kernels.arguments import Access, Buffer, Swizzle, TensorMap, float32, int32
from kernels.compiler import Cubin
from kernels.cubin_cache import CubinCache
from kernels.driver import CudaDevice
from kernels.errors import LaunchError
from kernels.launch import Launch, Program


class FakeGraph:
    def capture_begin(self, capture_error_mode: str) -> None:
        self.steps = [f"begin {capture_error_mode}"]

    def capture_end(self) -> None:
        self.steps.append("end")

    def replay(self) -> None:
        self.steps.append("replay")


def make_launch(kernel: str = "copy", **changes: Any) -> Launch:
    values = torch.zeros(64, 32, dtype=torch.bfloat16)
    buffer = Buffer("values", values, Access.READ, "T E", torch.bfloat16)
    tensor_map = TensorMap(buffer, (32, 64), (64,), (32, 8), Swizzle.BYTES_64, l2_promotion_bytes=128)
    arguments = (buffer, tensor_map, int32("count", -7), float32("eps", 0.1))
    settings: dict[str, Any] = {"grid": (6, 2, 1), "block": (128, 2, 1), "arguments": arguments, **changes}
    return Launch(Program(Path(__file__).parent / "copy.cu", (("E", 32),)), kernel, **settings)


def message(call: Any) -> str:
    try:
        call()
    except LaunchError as error:
        return str(error)
    return "no error"


def main(cache_folder: Path) -> None:
    bound_in: list[str] = []
    graph = FakeGraph()
    event = mock.Mock()
    event.synchronize.side_effect = [None, RuntimeError("CUDA error: an illegal memory access")]
    torch_cuda = {
        "is_available": mock.Mock(return_value=True),
        "current_device": mock.Mock(return_value=1),
        "get_device_capability": mock.Mock(return_value=(9, 0)),
        "get_device_name": mock.Mock(return_value="a GPU"),
        "get_device_properties": mock.Mock(return_value=SimpleNamespace(multi_processor_count=132)),
        "set_device": mock.Mock(side_effect=lambda _: bound_in.append(threading.current_thread().name)),
        "current_stream": mock.Mock(return_value=SimpleNamespace(cuda_stream=0x5EED, synchronize=lambda: None)),
        "Stream": mock.MagicMock(),
        "stream": mock.MagicMock(),
        "CUDAGraph": mock.Mock(return_value=graph),
        "Event": mock.Mock(return_value=event),
        "synchronize": mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")),
    }
    with mock.patch.multiple(torch.cuda, **torch_cuda):
        device = CudaDevice(cache=CubinCache(cache_folder, compile_with=lambda _: Cubin(b"an image", {}, "")))
        first = make_launch()
        device.launch(first)
        device.launch(make_launch(cluster=(2, 1, 1), shared_bytes=100_000, overlaps_previous=True, block=(32, 1, 1)))
        device.launch(make_launch(shared_bytes=60_000))
        worker = threading.Thread(target=device.launch, args=(make_launch(),), name="worker")
        worker.start()
        worker.join()

        def record() -> None:
            device.launch(make_launch("other"))
            device.launch(make_launch("other"))

        device.capture(record).replay()
        marks = device.mark(), device.mark()
        found: dict[str, Any] = {
            "mark_passed": message(marks[0].wait),
            "mark_failed": message(marks[1].wait),
            "num_recorded": event.record.call_count,
            "address": first.arguments[0].tensor.data_ptr(),  # type: ignore[union-attr]
            "num_sms": device.num_sms,
            "torch_device": str(device.torch_device),
            "bound_in": bound_in,
            "graph": graph.steps,
            "report": device.report(),
            "refused": message(lambda: device.launch(make_launch(grid=(666, 1, 1)))),
            "missing": message(lambda: device.launch(make_launch("missing"))),
            "synchronize": message(device.synchronize),
        }
        torch_cuda["get_device_capability"].return_value = (8, 0)
        found["other_gpu"] = message(CudaDevice)
        torch_cuda["is_available"].return_value = False
        found["no_gpu"] = message(CudaDevice)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
