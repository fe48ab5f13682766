"""The barriers, waits and fences that the unit kernels need, as mistakes to plant."""

from __future__ import annotations

from functools import partial

from kernels.launch import Device
from tests.emulator.build import Mutant
from tests.emulator.mutation import Subject
from tests.kernels.unit import Unit
from tests.kernels.units import ALL

SIGNAL = "bar_arrive<1>(128);\n      bar_sync<2>(128);\n"
INIT = (
    "mbarrier_init(&full[i], 32), mbarrier_init(&empty[i], 96);\n    fence_mbarrier_init();\n  }\n  __syncthreads();\n"
)
BULK = "l2_evict_first());\n  }\n  __syncthreads();\n  mbarrier_wait(loaded, 0);\n"

# Unit -> (name, old, new).
MISTAKES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "ldmatrix and stmatrix": (
        (
            "no __syncwarp before ldmatrix",
            "ld16<Words>(in + lane * 4));\n  __syncwarp();\n",
            "ld16<Words>(in + lane * 4));\n",
        ),
        ("no __syncwarp after stmatrix", "[2][lane], r4);\n  __syncwarp();\n", "[2][lane], r4);\n"),
    ),
    "named barriers": (
        ("the slot is rewritten before it is read", SIGNAL, "bar_arrive<1>(128);\n"),
        ("readers do not wait", "      bar_sync<1>(128);\n", ""),
        ("readers do not say that they are done", "      bar_arrive<2>(128);\n", ""),
        ("a count of fewer threads", "bar_arrive<2>(128)", "bar_arrive<2>(96)"),
    ),
    "mbarriers": (
        ("the producer does not wait", "      mbarrier_wait(&empty[s], phase ^ 1);\n", ""),
        ("the producer waits for the wrong phase", "&empty[s], phase ^ 1", "&empty[s], phase"),
        ("consumers do not wait", "      while (!mbarrier_try_wait(&full[s], phase)) {\n      }\n", ""),
        (
            "consumers try once",
            "while (!mbarrier_try_wait(&full[s], phase)) {\n      }",
            "mbarrier_try_wait(&full[s], phase);",
        ),
        ("the producer does not arrive", "      mbarrier_arrive(&full[s]);\n", ""),
        ("consumers do not arrive", "      mbarrier_arrive(&empty[s]);\n", ""),
        ("no barrier after the initialisation", INIT, INIT.replace("  __syncthreads();\n", "")),
        (
            "invalidated while in use",
            "  __syncthreads();\n  if (t == 0) {\n    for (int i = 0; i < 2; i++) mbarrier_inval",
            "  if (t == 0) {\n    for (int i = 0; i < 2; i++) mbarrier_inval",
        ),
    ),
    "last block": (
        ("counter not cleared before others add", "sum[0] = 0;\n  __syncthreads();\n", "sum[0] = 0;\n"),
        ("sum read before all have added", "threadIdx.x]);\n  __syncthreads();\n", "threadIdx.x]);\n"),
        ("no fence before the ticket", "sum[0];\n    __threadfence();\n", "sum[0];\n"),
        (
            "a fence for the block only before the ticket",
            "sum[0];\n    __threadfence();\n",
            "sum[0];\n    __threadfence_block();\n",
        ),
        ("no fence after the ticket", "gridDim.x - 1);\n    __threadfence();\n", "gridDim.x - 1);\n"),
        ("ticket read before it is drawn", "  }\n  __syncthreads();\n  if (ticket", "  }\n  if (ticket"),
        ("sum without atomics", "atomicAdd(&sum[0], in[", "sum[0] += (in["),
    ),
    "dependent launch": (
        ("no wait for the kernel before", "  griddep_wait();\n  griddep_launch();\n", "  griddep_launch();\n"),
        (
            "input read before the wait",
            "const u32 w = weights[threadIdx.x];",
            "const u32 w = weights[threadIdx.x] + in[threadIdx.x] * 0u + (in[threadIdx.x] == 1u);",
        ),
    ),
    "cp.async": (
        ("first group not waited for", "  cp_async_wait<1>();\n", ""),
        ("second group not waited for", "  cp_async_wait<0>();\n", ""),
        ("no barrier after the first wait", "cp_async_wait<1>();\n  __syncthreads();\n", "cp_async_wait<1>();\n"),
        ("no barrier after the second wait", "cp_async_wait<0>();\n  __syncthreads();\n", "cp_async_wait<0>();\n"),
    ),
    "bulk copies": (
        (
            "no fence after the initialisation",
            "    mbarrier_init(loaded, 1);\n    fence_mbarrier_init();\n    bulk_prefetch_l2",
            "    mbarrier_init(loaded, 1);\n    bulk_prefetch_l2",
        ),
        ("no barrier after the initialisation", BULK, BULK.replace("  __syncthreads();\n", "")),
        ("loads not waited for", BULK, BULK.replace("  mbarrier_wait(loaded, 0);\n", "")),
        ("half of the bytes expected", "    mbarrier_expect_tx(loaded, 4096);\n", ""),
        ("no proxy fence", "^= 0x55;\n  fence_proxy_async();\n", "^= 0x55;\n"),
        ("no barrier before the stores", "  fence_proxy_async();\n  __syncthreads();\n", "  fence_proxy_async();\n"),
        ("stores not waited for", "    bulk_wait_read<1>();\n    bulk_wait<0>();\n", "    bulk_wait_read<1>();\n"),
    ),
    "cluster": (
        (
            "shared memory of others read before it is written",
            "  cluster_arrive();\n  cluster_wait();\n",
            "  __syncthreads();\n",
        ),
        ("arrived, not waited", "  cluster_wait();\n", ""),
        (
            "a block leaves while others read it",
            "  cluster_sync_readers();  // nobody leaves while its shared memory may be read\n",
            "",
        ),
        ("multicast load not waited for", "  mbarrier_wait_cluster(loaded, 0);\n  for (u32 i", "  for (u32 i"),
        (
            "no fence after the initialisation",
            "    mbarrier_init(greeted, 64);\n    fence_mbarrier_init();\n",
            "    mbarrier_init(greeted, 64);\n",
        ),
        ("multicast to blocks that are not there", "(u16)((1 << size) - 1)", "(u16)((2 << size) - 1)"),
    ),
}


def _run(unit: Unit, device: Device) -> None:
    unit.check(unit.run(device))


def _subject(unit: Unit) -> Subject:
    mutants = tuple(Mutant.of(name, "units.cu", old, new) for name, old, new in MISTAKES[unit.name])
    return Subject(unit.name, partial(_run, unit), mutants)


UNIT_SUBJECTS = tuple(_subject(unit) for unit in ALL if unit.name in MISTAKES)
