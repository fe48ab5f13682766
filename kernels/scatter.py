"""Words of a memory set to given values: the kernel that brings what the host changes between two steps to its place."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer
from kernels.contract import check_arguments, check_size
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_NUM_THREADS = 256
_MAX_BLOCKS = 64
MAX_WORDS = 2**31 - 1
"""Words of a memory at most: places are INT32."""
_SECTOR_BYTES = 32


def scatter(device: Device, *, updates: torch.Tensor, memory: torch.Tensor, num_updates: torch.Tensor) -> None:
    """memory[place] = value for each (place, value) of `updates`.

    updates [n, 2] INT32, places in [0, N), each at most once; num_updates [1] INT32: how many there are, at most n. memory
    [N] INT32, updated. ContractError.
    """
    buffers = (
        Buffer("updates", updates, Access.READ, "n 2", torch.int32),
        Buffer("memory", memory, Access.UPDATE, "N", torch.int32),
        Buffer("num_updates", num_updates, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("scatter", device, buffers)
    check_size("scatter", "n", sizes["n"], at_least=1)
    check_size("scatter", "N", sizes["N"], at_least=1, at_most=MAX_WORDS)
    device.launch(
        Launch(
            program(),
            "scatter",
            grid=(min(_MAX_BLOCKS, -(-sizes["n"] // _NUM_THREADS)), 1, 1),
            block=(_NUM_THREADS, 1, 1),
            arguments=buffers,
            overlaps_previous=True,
        )
    )


def program() -> Program:
    """The kernel for every size."""
    return Program.of("scatter", NUM_THREADS=_NUM_THREADS)


def scatter_reference(
    *, updates: torch.Tensor, memory: torch.Tensor, num_updates: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The same by indexing."""
    expected = memory.clone()
    places, values = updates[: int(num_updates)].unbind(1)
    expected[places.long()] = values
    return {"memory": expected}


CASES = (
    Case("page ids of a decode step", {"n": 8192, "N": 1 << 20, "updates": 4}, is_timed=True),
    Case("more than the grid has threads", {"n": 40_000, "N": 50_000, "updates": 40_000}),
    Case("one word", {"n": 1, "N": 1, "updates": 1}),
    Case("a block and a part", {"n": 300, "N": 1000, "updates": 290}),
    Case("nothing", {"n": 300, "N": 1000, "updates": 0}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Places anywhere, values of every size; behind the updates there are ones that must not be made."""
    generator = torch.Generator().manual_seed(seed)
    room, num_words, num_updates = (case.sizes[name] for name in ("n", "N", "updates"))
    values = torch.randint(-(2**31), 2**31, (room,), generator=generator)
    places = torch.zeros(room, dtype=torch.int64)
    places[:num_updates] = torch.randperm(num_words, generator=generator)[:num_updates]
    return {
        "updates": torch.stack((places, values), dim=1).int(),
        "memory": torch.randint(-(2**31), 2**31, (num_words,), generator=generator).int(),
        "num_updates": torch.tensor([num_updates], dtype=torch.int32),
    }


def cost(case: Case) -> Cost:
    """Each update is read once, and writes a part of a sector."""
    return Cost(flops=0, bytes=case.sizes["updates"] * (8 + _SECTOR_BYTES))


OP = Op(
    name="scatter",
    formula="memory[place] = value for each (place, value)",
    launch=scatter,
    make_inputs=make_inputs,
    reference=scatter_reference,
    bounds=lambda inputs, expected: {"memory": 0.0},
    cost=cost,
    cases=CASES,
    programs=(program(),),
    outputs=(),
    updated=("memory",),
)
