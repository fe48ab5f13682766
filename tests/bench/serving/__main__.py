"""python -m tests.bench.serving (`make bench-serving`): how fast requests are served, in steady state, in under 8 minutes.

    python -m tests.bench.serving engine    our engine without Triton, and the peers that can be imported here
    python -m tests.bench.serving triton    the models of a real tritonserver, over gRPC streams

For each scenario the tokens a second with its number of concurrent requests; then time to first token and between tokens while
requests arrive by themselves. With a GPU: a random Mistral NeMo 12B in FP8. Without one, or with --toy: the same program at
toy scale, whose numbers are no results of the model's. The results are written after each number.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from backend.engine import messages
from kernels.driver import CudaDevice
from kernels.errors import KernelError
from tests.bench.conditions import RESULTS, conditions
from tests.bench.serving.bench import WAYS, Bench
from tests.bench.serving.checkpoint import write_checkpoint
from tests.bench.serving.machine import read_ceiling
from tests.bench.serving.roofline import Roofline
from tests.bench.serving.scale import FULL, SMALL, Scale
from tests.bench.serving.scenarios import SCENARIOS
from tests.bench.serving.triton_way import prepare_wheel
from tests.bench.serving.way import ServingError

TOY = "TOY SCALE without a GPU: it shows that all of it runs; no number says anything about Mistral NeMo 12B"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all of ours was measured, or that for which there was time; 1 when something failed; 2 for a wrong option."""
    options = _parser().parse_args(argv)
    is_toy = options.toy or not torch.cuda.is_available()
    name = f"serving_{options.what}"
    json_file = options.json or (
        None if options.no_results else RESULTS / (f"{name}_toy.json" if is_toy else f"{name}.json")
    )
    if is_toy and json_file is not None and json_file.resolve() == RESULTS / f"{name}.json":
        print(f"bench-serving: {json_file} holds what a GPU gave, and this is toy scale", file=sys.stderr)
        return 2
    sys.setswitchinterval(messages.SWITCH_INTERVAL_S)
    about = conditions("tests.bench.serving", sys.argv[1:] if argv is None else argv)
    try:
        if options.triton is not None:
            prepare_wheel(options.triton)
        roofline = None
        if not is_toy:
            device = CudaDevice()
            roofline = Roofline(FULL.config, read_ceiling(device))
            about |= {"gpu": torch.cuda.get_device_name(), "read_ceiling_tb_per_s": roofline.bytes_per_us / 1e6}
        print(f"bench-serving: {TOY if is_toy else about['gpu']}", flush=True)
        scale = _chosen(SMALL if is_toy else FULL, options)
        with tempfile.TemporaryDirectory(prefix="serving-", dir=options.folder) as temporary:
            folder = Path(temporary)
            checkpoint = write_checkpoint(
                folder / "checkpoint", scale.config, torch.device("cpu" if is_toy else "cuda")
            )
            if not is_toy:
                torch.cuda.empty_cache()  # the engine needs it
            bench = Bench(scale, about, seconds=options.seconds, json_file=json_file, roofline=roofline)
            if options.what == "engine":
                bench.engine(checkpoint, folder, options.ways or WAYS["engine"])
            else:
                bench.triton(checkpoint, folder, options.ways or WAYS["triton"], options.triton)
    except (ServingError, KernelError) as error:
        print(f"bench-serving: {error}", file=sys.stderr)
        return 1
    bench.write()
    print(f"bench-serving: {TOY if is_toy else f'results in {json_file}'}", flush=True)
    return int(bench.has_failed)


def _chosen(scale: Scale, options: argparse.Namespace) -> Scale:
    scenarios = tuple(each for each in scale.scenarios if options.scenarios is None or each.name in options.scenarios)
    settings = scale.settings | ({"runner": options.runner} if options.runner else {})
    window_s = scale.window_s if options.window_s is None else options.window_s
    return replace(scale, scenarios=scenarios, settings=settings, window_s=window_s)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.serving", allow_abbrev=False, description=__doc__.partition("\n")[0]
    )
    parser.add_argument("what", choices=sorted(WAYS))
    parser.add_argument("--scenarios", nargs="+", choices=[each.name for each in SCENARIOS], help="only these")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS["engine"], *WAYS["triton"]], help="only these")
    parser.add_argument("--runner", choices=("torch", "cuda"), help="default: cuda on a GPU, else torch")
    parser.add_argument("--toy", action="store_true", help="toy scale, though a GPU is there")
    parser.add_argument("--seconds", type=float, default=420.0, help="nothing new is begun after that (default: 420)")
    parser.add_argument("--window-s", type=float, help="length of each steady state (default: 8, toy 2)")
    parser.add_argument(
        "--triton",
        type=Path,
        default=os.environ.get("TRITON_WHEEL") or None,
        help="folder with the unpacked wheel of nvidia-pytriton (default: TRITON_WHEEL, else as installed)",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written, 13.6 GB on a GPU (default: TMPDIR)"
    )
    parser.add_argument(
        "--json", type=Path, help="results (default: results/serving_<what>.json, at toy scale ..._toy.json)"
    )
    parser.add_argument("--no-results", action="store_true", help="write none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
