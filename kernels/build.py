"""Compiles many programs ahead, in parallel, and says how far it is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from kernels.cubin_cache import CubinCache
from kernels.program import Program


def build(
    programs: Iterable[Program], cache: CubinCache | None = None, report: Callable[[str], None] | None = None
) -> int:
    """Compiles what the cache lacks, on all cores, and gives how many that were.

    `report` gets a line when compiling begins, for every program, and at the end; default: written to stderr. Threads are
    enough, since NVRTC runs without Python's lock. BuildError of the first program that fails.
    """
    cache = cache or CubinCache()
    report = report or (lambda line: print(line, file=sys.stderr, flush=True))
    wanted = list(dict.fromkeys(programs))
    missing = [program for program in wanted if cache.find(program) is None]
    if not missing:
        return 0
    num_workers = min(len(missing), len(os.sched_getaffinity(0)))
    report(
        f"kernels: compiling {len(missing)} of {len(wanted)} programs on {num_workers} cores into {cache.folder}, once"
    )
    started = time.monotonic()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="nvrtc") as pool:
        running = {pool.submit(cache.get, program): program for program in missing}
        try:
            for num_done, future in enumerate(as_completed(running), start=1):
                future.result()
                report(f"kernels: {num_done}/{len(missing)} {running[future]}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    report(f"kernels: compiled {len(missing)} programs in {time.monotonic() - started:.1f} s")
    return len(missing)
