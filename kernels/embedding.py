"""The rows of the token embedding for the tokens of a step."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer, int32
from kernels.contract import check_arguments, check_size
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_NUM_THREADS = 128


def embedding(
    device: Device,
    *,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    last_ids: torch.Tensor,
    out: torch.Tensor,
    num_tokens: torch.Tensor,
) -> None:
    """out[t] = table[id], with id = token_ids[t], or last_ids[-1 - token_ids[t]] where that is negative.

    table [V, E] BF16, constant; E a multiple of 128. token_ids [T] INT32: ids, or -1 - slot for the id last drawn in a
    slot. last_ids [slots] INT32. out [T, E] BF16. num_tokens [1] INT32: rows from there on are left alone.

    An id outside [0, V) gives a row of NaN. ContractError.
    """
    buffers = (
        Buffer("table", table, Access.CONSTANT, "V E", torch.bfloat16),
        Buffer("token_ids", token_ids, Access.READ, "T", torch.int32),
        Buffer("last_ids", last_ids, Access.READ, "slots", torch.int32),
        Buffer("out", out, Access.WRITE, "T E", torch.bfloat16),
        Buffer("num_tokens", num_tokens, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("embedding", device, buffers)
    check_size("embedding", "E", sizes["E"], multiple_of=128, at_least=128)
    device.launch(
        Launch(
            program(sizes["E"]),
            "embedding",
            grid=(sizes["T"], -(-sizes["E"] // (8 * _NUM_THREADS)), 1),
            block=(_NUM_THREADS, 1, 1),
            arguments=(*buffers, int32("vocab_size", sizes["V"])),
            overlaps_previous=True,
        )
    )


def program(hidden_size: int) -> Program:
    """The kernel for rows of `hidden_size`."""
    return Program.of("embedding", HIDDEN=hidden_size, NUM_THREADS=_NUM_THREADS)


def embedding_reference(
    *,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    last_ids: torch.Tensor,
    out: torch.Tensor,
    num_tokens: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The same by indexing."""
    ids = torch.where(token_ids < 0, last_ids[(-1 - token_ids).clamp(min=0).long()], token_ids).long()
    is_known = (ids >= 0) & (ids < len(table))
    rows = table[ids.clamp(0, len(table) - 1)].float()
    return {"out": torch.where(is_known[:, None], rows, torch.nan)}


CASES = (
    Case("NeMo decode", {"T": 64, "E": 5120, "V": 131072, "slots": 256}, is_emulated=False, is_timed=True),
    Case("NeMo prefill", {"T": 8192, "E": 5120, "V": 131072, "slots": 256}, is_emulated=False, is_timed=True),
    Case("one piece", {"T": 1, "E": 128, "V": 8, "slots": 1}),
    Case("a block and a part", {"T": 5, "E": 1152, "V": 33, "slots": 4}),
    Case("many tokens", {"T": 70, "E": 256, "V": 1000, "slots": 16}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Ids over the whole vocabulary, every third of them by slot; with several tokens the second id is none."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, vocab_size, num_slots = case.sizes["T"], case.sizes["V"], case.sizes["slots"]
    token_ids = torch.randint(vocab_size, (num_tokens,), generator=generator, dtype=torch.int32)
    token_ids[::3] = -1 - torch.randint(num_slots, (len(token_ids[::3]),), generator=generator, dtype=torch.int32)
    # Few random rows, again and again: all of them would take seconds. 1009 is prime, so that neighbours of any stride differ.
    rows = torch.randn(min(vocab_size, 1009), case.sizes["E"], generator=generator).bfloat16()
    if num_tokens > 1:
        token_ids[1] = vocab_size
    return {
        "table": rows.repeat(-(-vocab_size // len(rows)), 1)[:vocab_size],
        "token_ids": token_ids,
        "last_ids": torch.randint(vocab_size, (num_slots,), generator=generator, dtype=torch.int32),
        "out": torch.empty(num_tokens, case.sizes["E"], dtype=torch.bfloat16),
        "num_tokens": torch.tensor([num_tokens], dtype=torch.int32),
    }


def cost(case: Case) -> Cost:
    """Each row is read and written once."""
    return Cost(flops=0, bytes=case.sizes["T"] * (4 * case.sizes["E"] + 4))


OP = Op(
    name="embedding",
    formula="out[t] = table[token_ids[t]]",
    launch=embedding,
    make_inputs=make_inputs,
    reference=embedding_reference,
    bounds=lambda inputs, expected: {"out": 0.0},
    cost=cost,
    cases=CASES,
    programs=(program(5120),),
    outputs=("out",),
    rows=("token_ids", "out"),
)
