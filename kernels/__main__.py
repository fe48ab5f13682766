"""python -m kernels build|check|bench|list [operation]: see `python -m kernels --help`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kernels.build import build
from kernels.check import check_case
from kernels.cubin_cache import CubinCache
from kernels.errors import KernelError
from kernels.launch import Device
from kernels.op import Op
from kernels.ops import OPS, select_ops
from kernels.table import TABLE_BEGIN, kernel_table, write_table


def main(
    arguments: Sequence[str] | None = None, make_device: Callable[[], Device] | None = None, only_emulated: bool = False
) -> int:
    """Runs one command and gives the exit status. `make_device` default: this machine's GPU."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        ops = select_ops(options.op)
        match options.command:
            case "build":
                return _build(ops)
            case "check":
                return _check(ops, (make_device or _gpu)(), options.seed, only_emulated)
            case "bench":
                return _bench(ops, options.json)
            case _:
                return _list(ops, is_written=options.write)
    except KernelError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels", description="Builds, checks, times and lists the kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    operation = argparse.ArgumentParser(add_help=False)
    operation.add_argument("op", nargs="?", help="one operation (default: all)")
    commands.add_parser(
        "build", parents=[operation], help="compile what Mistral NeMo needs, into the cache; no GPU needed"
    )
    check = commands.add_parser("check", parents=[operation], help="run every case on the GPU against its reference")
    check.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    bench = commands.add_parser(
        "bench", parents=[operation], help="time the cases that users run, each after its check"
    )
    bench.add_argument("--json", type=Path, help="write the timings and the machine into this file, too")
    table = commands.add_parser("list", parents=[operation], help="the kernel table; no GPU needed")
    table.add_argument("--write", action="store_true", help=f"write it into kernels/README.md, behind {TABLE_BEGIN}")
    return parser


def _gpu() -> Device:
    from kernels.driver import CudaDevice

    return CudaDevice()


def _build(ops: Sequence[Op]) -> int:
    cache = CubinCache()
    programs = [program for op in ops for program in op.programs]
    if build(programs, cache) == 0:
        print(f"kernels: all {len(programs)} programs are in {cache.folder}", file=sys.stderr)
    return 0


def _check(ops: Sequence[Op], device: Device, seed: int, only_emulated: bool) -> int:
    num_failed = 0
    for op in ops:
        for case in op.cases:
            if only_emulated and not case.is_emulated:
                continue
            started = time.monotonic()
            try:
                result = check_case(op, case, device, seed)
            except KernelError as error:
                num_failed += 1
                print(f"{op.name:<16} {case.name:<32} FAILED\n    {error}", flush=True)
            else:
                seconds = time.monotonic() - started
                print(
                    f"{op.name:<16} {case.name:<32} error / bound {result.worst_share:.3f}  {seconds:.1f} s", flush=True
                )
    print(f"{num_failed} failed" if num_failed else "all passed")
    return 1 if num_failed else 0


def _bench(ops: Sequence[Op], json_file: Path | None) -> int:
    from kernels.bench import bench
    from kernels.driver import CudaDevice

    results = bench(ops, CudaDevice(), lambda line: print(line, flush=True))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _list(ops: Sequence[Op], *, is_written: bool) -> int:
    table = kernel_table(ops, CubinCache())
    if not is_written:
        print(table)
    elif ops != OPS:
        raise KernelError("list --write takes no operation: the README's table has all of them")
    else:
        write_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
