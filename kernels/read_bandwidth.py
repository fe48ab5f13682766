"""How fast memory can be read: the measured ceiling of every other kernel's bandwidth."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer, uint32
from kernels.contract import check_arguments, check_size
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_NUM_THREADS = 512
_UNROLL = 8
_WORDS_PER_PIECE = 4
PROGRAM = Program.of("read_bandwidth", NUM_THREADS=_NUM_THREADS, UNROLL=_UNROLL)


def read_bandwidth(device: Device, *, data: torch.Tensor, sums: torch.Tensor) -> None:
    """sums[b] = sum of the 32-bit words that block b of B reads, modulo 2^32.

    data [N] INT32, N a multiple of 4, at most 2^33. sums [B] INT32, 1 to 65,535; 2 per SM reads fastest (not yet run on
    hardware). Block b reads pieces of 2048 words: b, b + B, b + 2 B and so on.

    ContractError.
    """
    buffers = (
        Buffer("data", data, Access.READ, "N", torch.int32),
        Buffer("sums", sums, Access.WRITE, "B", torch.int32),
    )
    sizes = check_arguments("read_bandwidth", device, buffers)
    check_size("read_bandwidth", "N", sizes["N"], multiple_of=_WORDS_PER_PIECE, at_most=1 << 33)
    check_size("read_bandwidth", "B", sizes["B"], at_least=1, at_most=65_535)
    device.launch(
        Launch(
            PROGRAM,
            "read_bandwidth",
            grid=(sizes["B"], 1, 1),
            block=(_NUM_THREADS, 1, 1),
            arguments=(*buffers, uint32("num_pieces", sizes["N"] // _WORDS_PER_PIECE)),
            overlaps_previous=True,
        )
    )


def read_bandwidth_reference(*, data: torch.Tensor, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same with 64-bit sums, taken modulo 2^32 as signed numbers."""
    words_per_block = _NUM_THREADS * _WORDS_PER_PIECE
    num_blocks = len(sums)
    padded = torch.zeros(
        -(-len(data) // (words_per_block * num_blocks)), num_blocks, words_per_block, dtype=torch.int64
    )
    padded.view(-1)[: len(data)] = data
    return {"sums": padded.sum(dim=(0, 2)).to(torch.int32)}


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """Integer sums are exact."""
    return {"sums": 0.0}


CASES = (
    Case("1 GiB", {"N": 1 << 28, "B": 264}, is_emulated=False, is_timed=True),
    Case("every block several times", {"N": 2048 * 45 + 100, "B": 3}),
    Case("idle blocks", {"N": 2048 + 4, "B": 3}),
    Case("nothing", {"N": 0, "B": 2}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random words, which repeat after a prime number of them that no block's share is a multiple of."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (1_000_003,), generator=generator).to(torch.int32)
    return {
        "data": words.repeat(-(-case.sizes["N"] // len(words)))[: case.sizes["N"]],
        "sums": torch.empty(case.sizes["B"], dtype=torch.int32),
    }


def cost(case: Case) -> Cost:
    """Every word once."""
    return Cost(flops=0, bytes=4 * (case.sizes["N"] + case.sizes["B"]))


OP = Op(
    name="read_bandwidth",
    formula="sums[b] = sum of the words that block b reads",
    launch=read_bandwidth,
    make_inputs=make_inputs,
    reference=read_bandwidth_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=(PROGRAM,),
    outputs=("sums",),
)
