"""How errors grow with the context when K and V are in FP8 or BF16: of attention to 131,072 tokens, and of the demo's logits.

    python -m tests.bench.bench_long_context [--lengths 1024 131072] [--demo-lengths 64 4096] [--no-results]

Attention: the kernels, on a Hopper GPU or by the emulator, against FP64 on values that were never rounded. Logits: the demo
checkpoint in FP32 through the PyTorch runner, behind 64 to 4,096 tokens of text, with its pages in BF16 and in FP8 against FP32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from backend.engine.plan import PAGE_TOKENS
from backend.runner.torch_runner import TorchRunner
from kernels.driver import CudaDevice
from kernels.launch import Device
from tests.bench.conditions import conditions, write_results
from tests.bench.gpu import long_context
from tests.bench.tables import long_context_table
from tests.demo.evaluate import CHECKPOINT
from tests.emulator.device import PLAIN, EmulatedDevice
from tests.evaluation.long_context import Prompts
from tests.unit.runner.driver import Driver, Script

_NUM_QUERIES = 2
_DEMO_LENGTHS = (64, 256, 1024, 4096)
_DEMO_ROWS = 32


def demo_logits(kv_dtype: str, lengths: Sequence[int]) -> list[torch.Tensor]:
    """For each length the logits [rows, V] behind the last tokens of so many of the haystack."""
    runner = TorchRunner(
        CHECKPOINT,
        num_pages=-(-max(lengths) // PAGE_TOKENS),
        max_num_seqs=1,
        max_model_len=max(lengths),
        weight_dtype="fp32",
        kv_dtype=kv_dtype,
    )
    driver, text = Driver(runner), tuple(Prompts.of_checkpoint(CHECKPOINT).text(max(lengths)))
    found = []
    for length in lengths:
        script = Script(
            prompt=text[:length],
            chunks=(length - _DEMO_ROWS, *(1,) * _DEMO_ROWS),
            pages=tuple(range(-(-length // PAGE_TOKENS))),
            is_every_chunk_sampled=True,
        )
        driver.run([script])
        found.append(torch.stack(script.logits[1:]))
    runner.close()
    return found


def measure_demo(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """A cell for each length and KV dtype: the error of the logits over their spread."""
    expected = demo_logits("fp32", lengths)
    cells = []
    for name in long_context.KV_DTYPES:
        for length, actual, wanted in zip(lengths, demo_logits(name, lengths), expected, strict=True):
            error = ((actual - wanted).square().mean() / wanted.var()).sqrt()
            cells.append({"length": length, "kv_dtype": name, "error": float(error)})
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_long_context", allow_abbrev=False)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(long_context.LENGTHS), help="of the kernels' contexts"
    )
    parser.add_argument("--demo-lengths", type=int, nargs="+", default=list(_DEMO_LENGTHS), help="of the demo's texts")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions("tests.bench.bench_long_context", argv if argv is not None else sys.argv[1:])
    device: Device = CudaDevice() if torch.cuda.is_available() else EmulatedDevice(PLAIN[0])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the emulator"
    cells = []
    for cell in long_context.measure(device, arguments.lengths, num_queries=_NUM_QUERIES, num_heads=4, num_kv_heads=1):
        cells.append(cell)
        print(long_context.line(cell), file=sys.stderr, flush=True)
    results = about | {"kernels_on": where, "cells": cells, "demo": measure_demo(arguments.demo_lengths)}
    print(long_context_table(results))
    if not arguments.no_results:
        write_results("long_context", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
