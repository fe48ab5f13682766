"""Log-probabilities of one id in each of some rows of logits and of its most likely ids, and the id's rank."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer, int32
from kernels.contract import check_arguments, check_size
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

MAX_VOCAB = 1 << 18
MAX_TOPS = 32
_NUM_THREADS = 512


def log_probs(
    device: Device,
    *,
    logits: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    chosen_log_probs: torch.Tensor,
    ranks: torch.Tensor,
    top_ids: torch.Tensor | None,
    top_log_probs: torch.Tensor | None,
    num_rows: torch.Tensor,
) -> None:
    """log p(i) = x_i - max x - log(sum of exp(x_j - max x)) of some rows x, at their ids and at their most likely ids.

    logits [m, V] FP32, V a multiple of 8, at most 262,144. ids [m] INT32, in [0, V). rows [n] INT32, in [0, m): those of
    both that are wanted. Written: chosen_log_probs [n] FP32; ranks [n] INT32, 1 + how many logits are greater; top_ids
    [n, k] INT32 and top_log_probs [n, k] FP32 in falling order, lowest id first among equals, k at most 32 and V; both None
    for none. num_rows [1] INT32: of `rows` and what is written, those from there on are left alone.

    A row that has NaN or infinity gets NaN as its log-probabilities. A row's results depend, bit for bit, on its own
    logits alone. ContractError.
    """
    buffers = (
        Buffer("logits", logits, Access.READ, "m V", torch.float32),
        Buffer("ids", ids, Access.READ, "m", torch.int32),
        Buffer("rows", rows, Access.READ, "n", torch.int32),
        Buffer("chosen_log_probs", chosen_log_probs, Access.WRITE, "n", torch.float32),
        Buffer("ranks", ranks, Access.WRITE, "n", torch.int32),
        Buffer("top_ids", top_ids, Access.WRITE, "n k", torch.int32),
        Buffer("top_log_probs", top_log_probs, Access.WRITE, "n k", torch.float32),
        Buffer("num_rows", num_rows, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("log_probs", device, buffers)
    check_size("log_probs", "V", sizes["V"], multiple_of=8, at_least=8, at_most=MAX_VOCAB)
    num_tops = sizes.get("k", 0)
    check_size("log_probs", "k", num_tops, at_most=min(MAX_TOPS, sizes["V"]))
    check_size("log_probs", "tensors of the most likely", (top_ids is None) + (top_log_probs is None), multiple_of=2)
    device.launch(
        Launch(
            program(),
            "log_probs",
            grid=(sizes["n"], 1, 1),
            block=(_NUM_THREADS, 1, 1),
            arguments=(*buffers, int32("vocab_size", sizes["V"]), int32("num_tops", num_tops)),
            overlaps_previous=True,
        )
    )


def program() -> Program:
    """The kernel for every size."""
    return Program.of("log_probs")


def log_probs_reference(
    *,
    logits: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    chosen_log_probs: torch.Tensor,
    ranks: torch.Tensor,
    top_ids: torch.Tensor | None,
    top_log_probs: torch.Tensor | None,
    num_rows: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The same in FP64 with a sort."""
    places = rows.long()
    x, ids = logits[places].double(), ids[places].long()
    is_finite = torch.isfinite(x).all(dim=1, keepdim=True)
    log_p = torch.where(is_finite, torch.log_softmax(torch.where(is_finite, x, 0.0), dim=1), torch.nan)
    chosen = x.gather(1, ids.unsqueeze(1))
    expected = {
        "chosen_log_probs": log_p.gather(1, ids.unsqueeze(1))[:, 0],
        "ranks": (x > chosen).sum(dim=1) + 1,
    }
    if top_ids is not None:
        ranked = torch.where(x.isnan(), -torch.inf, x)
        order = torch.argsort(ranked, dim=1, descending=True, stable=True)[:, : top_ids.shape[1]]
        expected |= {"top_ids": order, "top_log_probs": log_p.gather(1, order)}
    return expected


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """Of the sum: FP32 exp within 1 ulp of its rounded argument (at most 88, so 88 * 2^-24), and 2^-44 lost per token.

    The weights of tokens whose argument is large are small, and the largest token's own is exact: 2^-20 bounds the
    relative error of the sum, and so the absolute error of its logarithm. Then one rounding to FP32.
    """
    of_sum = 2.0**-20 + inputs["logits"].shape[1] * 2.0**-44
    found: dict[str, torch.Tensor | float] = {"ranks": 0.0, "top_ids": 0.0}
    for name in ("chosen_log_probs", "top_log_probs"):
        if name in expected:
            found[name] = of_sum + expected[name].abs() * 2.0**-24
    return {name: bound for name, bound in found.items() if name in expected}


CASES = (
    Case("NeMo", {"n": 64, "V": 131072, "k": 5}, is_emulated=False, is_timed=True),
    Case("NeMo row", {"n": 1, "V": 131072, "k": 20}),
    Case("chosen only", {"n": 4, "V": 4096, "k": 0}),
    Case("fewer groups than tops", {"n": 3, "V": 520, "k": 20}),
    Case("few groups, long list", {"n": 2, "V": 2560, "k": 32}),
    Case("list just full", {"n": 2, "V": 1536, "k": 20}),
    Case("everything equal", {"n": 2, "V": 8200, "k": 7}, {"logits": "equal"}),
    Case("many equal", {"n": 2, "V": 9000, "k": 20}, {"logits": "coarse"}),
    Case("one group in part", {"n": 3, "V": 8, "k": 8}),
)


def make_logits(num_rows: int, vocab_size: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Rows [n, V] FP32: "normal" with a few likely tokens, "equal", "coarse" (few different values), "flat" or
    "peaked"."""
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    match kind:
        case "normal":
            likely = torch.randint(vocab_size, (num_rows, 20), generator=generator)
            return logits.scatter_add_(1, likely, 8 + 4 * torch.rand(num_rows, 20, generator=generator))
        case "equal":
            return torch.full_like(logits, -2.5)
        case "coarse":
            return logits.round()
        case "flat":
            return logits * 0.01
        case "peaked":
            logits[:, vocab_size // 3] = 60.0
            return logits
        case _:
            raise ValueError(f"kind of logits: {kind}")


def make_inputs(case: Case, seed: int) -> Inputs:
    """Rows that are not in order, one of them left out; the first one's id is a likely one, the others' any."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, vocab_size, num_tops = (case.sizes[letter] for letter in ("n", "V", "k"))
    logits = make_logits(num_rows + 1, vocab_size, case.options.get("logits", "normal"), generator)
    ids = torch.randint(vocab_size, (num_rows + 1,), generator=generator)
    rows = torch.randperm(num_rows + 1, generator=generator)[:num_rows]
    ids[rows[0]] = logits[rows[0]].argmax()
    return {
        "logits": logits,
        "ids": ids.int(),
        "rows": rows.int(),
        "chosen_log_probs": torch.empty(num_rows),
        "ranks": torch.empty(num_rows, dtype=torch.int32),
        "top_ids": torch.empty(num_rows, num_tops, dtype=torch.int32) if num_tops else None,
        "top_log_probs": torch.empty(num_rows, num_tops) if num_tops else None,
        "num_rows": torch.tensor([num_rows], dtype=torch.int32),
    }


def cost(case: Case) -> Cost:
    """Each wanted row is read once; what it writes is nothing beside that."""
    num_logits = case.sizes["n"] * case.sizes["V"]
    return Cost(flops=20 * num_logits, bytes=4 * num_logits)


OP = Op(
    name="log_probs",
    formula="log p(i) = x_i - max x - log(sum_j exp(x_j - max x))",
    launch=log_probs,
    make_inputs=make_inputs,
    reference=log_probs_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=(program(),),
    outputs=("chosen_log_probs", "ranks", "top_ids", "top_log_probs"),
    rows=("rows", "chosen_log_probs", "ranks", "top_ids", "top_log_probs"),
)
