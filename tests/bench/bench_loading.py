"""How fast a checkpoint of Mistral NeMo's layers gets from the page cache onto the device, and with how much host memory.

    python -m tests.bench.bench_loading [--layers 4] [--weights bf16 fp8] [--repeats 3] [--folder FOLDER] [--no-result]

The folder (default: a temporary one) keeps the checkpoint, 0.55 GB a layer and 0.67 GB
besides; one that is there already is used again.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from backend.checkpoint.layouts import tensor_specs
from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import read_model_config
from backend.checkpoint.weight_loader import load_weights
from tests.bench.conditions import conditions, write_results
from tests.checkpoints import TinyConfig, config_json, write_json

_FILE_LAYERS = 8
_FORMATS = {
    "bf16": WeightFormat(torch.bfloat16),
    "fp8": WeightFormat(torch.bfloat16, has_fp8_linears=True),
}


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Random BF16 weights, one file for every eight layers, and one for what is outside of them."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = TinyConfig(
        num_layers=num_layers,
        hidden_size=5120,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=14336,
        vocab_size=32768,
    )
    write_json(folder / "config.json", config_json(sizes, torch.bfloat16))
    num_files = 1 + -(-num_layers // _FILE_LAYERS)
    paths = [folder / f"model-{number + 1:05}-of-{num_files:05}.safetensors" for number in range(num_files)]
    for path in paths:
        path.touch()  # so that it is a checkpoint, whose tensors can be asked for
    specs = tensor_specs(read_model_config(folder)).values()
    values = torch.randn(2**24).mul_(0.02).bfloat16()
    for number, path in enumerate(paths):
        tensors = {
            spec.name: values.new_empty(spec.shape)
            for spec in specs
            if (spec.layer + _FILE_LAYERS) // _FILE_LAYERS == number
        }
        for tensor in tensors.values():
            for part in tensor.view(-1).split(len(values)):
                part.copy_(values[: len(part)])
        save_file(tensors, path, metadata={"format": "pt"})
        print(f"written: file {number + 1} of {num_files}", flush=True)


def measure(folder: Path, kind: str, device: torch.device) -> dict[str, Any]:
    """One loading: seconds, processor time, source bytes, and the most memory the process has had so far."""
    sizes = [0]
    started_s, cpu_s = time.monotonic(), time.process_time()
    weights = load_weights(
        folder,
        read_model_config(folder),
        device=device,
        weight_format=_FORMATS[kind],
        progress=lambda _, total: sizes.append(total),
    )
    seconds = time.monotonic() - started_s
    del weights
    return {
        "weights": kind,
        "seconds": round(seconds, 2),
        "cpu_s": round(time.process_time() - cpu_s, 2),
        "source_gb": round(sizes[-1] / 1e9, 2),
        "gb_per_s": round(sizes[-1] / 1e9 / seconds, 2),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each loading."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_loading")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--weights", nargs="+", choices=sorted(_FORMATS), default=["bf16", "fp8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-result", action="store_true", help="keep no results/loading.json")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = conditions("tests.bench.bench_loading", sys.argv[1:] if argv is None else argv)
    results["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "config.json").exists():
            write_checkpoint(folder, arguments.layers)
        cells = []
        for repeat in range(arguments.repeats):
            for kind in arguments.weights:
                cells.append(measure(folder, kind, device) | {"repeat": repeat})
                print(cells[-1], flush=True)
    if not arguments.no_result:
        write_results("loading", results | {"layers": arguments.layers, "cells": cells})


if __name__ == "__main__":
    main()
