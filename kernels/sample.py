"""One id per row from its logits, by the parameters and the history of the row's slot."""

from __future__ import annotations

from typing import Any

import torch

from kernels.arguments import Access, Buffer, int32
from kernels.contract import check_arguments, check_size
from kernels.errors import ContractError
from kernels.launch import Device, Launch, Program
from kernels.log_probs import MAX_VOCAB, make_logits
from kernels.op import Case, Cost, Inputs, Op
from kernels.sample_reference import sample_reference

_SCAN_THREADS = 256
_DRAW_THREADS = 512
_TILE = 4096
_GROUP = 128

# Columns of the parameters' tensors; the launcher's docstring refers to them.
REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Columns of `reals`; off: 0, 1, 0, 1, 0, 0. Temperature 0 is greedy."""
INTEGERS = ("seed", "top_k", "min_tokens", "num_tops")
"""Columns of `integers`; seed is a bit pattern of UINT64; top_k V or more is off; num_tops is not used here."""
COUNTS = ("num_biases", "num_bad_words", "num_endings")
"""Columns of `counts`: how many entries of the slot's rows of bias_ids, bad_words and ending_ids are valid."""
IN_PROMPT = -(2**31)
"""Bit of a token's entry in `histories`: it stands in the prompt. The other bits count it in the output."""


def make_workspace(num_rows: int, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The workspace tensors of `sample`, by the names of its arguments; their content does not matter between calls.

    adjusted [S, V] FP32, group_maxima [S, ceil(V / 128)] INT32, and [S, ceil(V / 4096)]: tile_is_finite, tile_ties INT32,
    tile_scores, tile_fallbacks INT64.
    """
    tiles, groups = (num_rows, -(-vocab_size // _TILE)), (num_rows, -(-vocab_size // _GROUP))
    return {
        "adjusted": torch.empty(num_rows, vocab_size, device=device),
        "group_maxima": torch.empty(groups, dtype=torch.int32, device=device),
        "tile_is_finite": torch.empty(tiles, dtype=torch.int32, device=device),
        "tile_scores": torch.empty(tiles, dtype=torch.int64, device=device),
        "tile_ties": torch.empty(tiles, dtype=torch.int32, device=device),
        "tile_fallbacks": torch.empty(tiles, dtype=torch.int64, device=device),
    }


def sample(
    device: Device,
    *,
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    mask_rows: torch.Tensor,
    masks: torch.Tensor,
    reals: torch.Tensor,
    integers: torch.Tensor,
    counts: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    bad_words: torch.Tensor,
    ending_ids: torch.Tensor,
    histories: torch.Tensor,
    num_outputs: torch.Tensor,
    recent_ids: torch.Tensor,
    last_ids: torch.Tensor,
    adjusted: torch.Tensor,
    group_maxima: torch.Tensor,
    tile_is_finite: torch.Tensor,
    tile_scores: torch.Tensor,
    tile_ties: torch.Tensor,
    tile_fallbacks: torch.Tensor,
    token_ids: torch.Tensor,
    is_finite: torch.Tensor,
    num_rows: torch.Tensor,
) -> None:
    """Draw token_ids [S] INT32, and say in is_finite [S] INT32 (0, 1) whether the row's logits are all finite.

    In this order: penalties, bias, masks (grammar, endings before min_tokens, bad words), temperature, top-k, top-p,
    min-p, Gumbel-max with the noise of (seed, position, id); or, at temperature 0, the largest, the lowest id of equals.
    When grammar, endings and bad words leave nothing, the best the grammar allows is drawn. NaN ranks as -infinity.

    The step: logits [S, V] FP32, V a multiple of 8, at most 262,144. slots [S] INT32, each at most once. positions [S]
    INT32, where the new id will stand. mask_rows [S] INT32, row of masks [n, ceil(V / 32)] INT32 (bit i % 32 of word
    i // 32: id i is allowed), or -1. num_rows [1] INT32: rows from there on are left alone.
    Parameters by slot: reals [slots, 6] FP64, integers [slots, 4] INT64, counts [slots, 3] INT32 (see REALS, INTEGERS,
    COUNTS). bias_ids, bias_values [slots, B], an id at most once. bad_words [slots, N, W] INT32: ids right-aligned behind
    -1; the last may not follow the others. ending_ids [slots, Z] INT32.
    History by slot, updated: histories [slots, V] INT32 (see IN_PROMPT; kept only where a penalty is set), num_outputs
    [slots] INT32, recent_ids [slots, W - 1] INT32 (-1: none; kept only where there are bad words), last_ids [slots] INT32.
    The rest is workspace, see `make_workspace`.

    A row's id depends, bit for bit, on its logits, parameters and history alone. ContractError.
    """
    step = (
        Buffer("logits", logits, Access.READ, "S V", torch.float32),
        Buffer("slots", slots, Access.READ, "S", torch.int32),
        Buffer("positions", positions, Access.READ, "S", torch.int32),
        Buffer("mask_rows", mask_rows, Access.READ, "S", torch.int32),
        Buffer("masks", masks, Access.READ, "n words", torch.int32),
    )
    parameters = (
        Buffer("reals", reals, Access.READ, "slots 6", torch.float64),
        Buffer("integers", integers, Access.READ, "slots 4", torch.int64),
        Buffer("counts", counts, Access.READ, "slots 3", torch.int32),
    )
    lists = (
        Buffer("bias_ids", bias_ids, Access.READ, "slots B", torch.int32),
        Buffer("bias_values", bias_values, Access.READ, "slots B", torch.float32),
        Buffer("bad_words", bad_words, Access.READ, "slots N W", torch.int32),
        Buffer("recent_ids", recent_ids, Access.READ, "slots W-1", torch.int32),
        Buffer("ending_ids", ending_ids, Access.READ, "slots Z", torch.int32),
    )
    history = (
        Buffer("histories", histories, Access.UPDATE, "slots V", torch.int32),
        Buffer("num_outputs", num_outputs, Access.UPDATE, "slots", torch.int32),
        Buffer("recent_ids", recent_ids, Access.UPDATE, "slots W-1", torch.int32),
        Buffer("last_ids", last_ids, Access.UPDATE, "slots", torch.int32),
    )
    passed_on = (
        Buffer("adjusted", adjusted, Access.UPDATE, "S V", torch.float32),
        Buffer("group_maxima", group_maxima, Access.UPDATE, "S groups", torch.int32),
        Buffer("tile_is_finite", tile_is_finite, Access.UPDATE, "S tiles", torch.int32),
        Buffer("tile_scores", tile_scores, Access.UPDATE, "S tiles", torch.int64),
        Buffer("tile_ties", tile_ties, Access.UPDATE, "S tiles", torch.int32),
        Buffer("tile_fallbacks", tile_fallbacks, Access.UPDATE, "S tiles", torch.int64),
    )
    results = (
        Buffer("token_ids", token_ids, Access.WRITE, "S", torch.int32),
        Buffer("is_finite", is_finite, Access.WRITE, "S", torch.int32),
    )
    count = Buffer("num_rows", num_rows, Access.READ, "1", torch.int32)
    once = tuple(buffer for buffer in lists if buffer.name != "recent_ids")
    sizes = check_arguments("sample", device, (*step, *parameters, *once, *history, *passed_on, *results, count))
    vocab_size, num_tiles = sizes["V"], -(-sizes["V"] // _TILE)
    check_size("sample", "V", vocab_size, multiple_of=8, at_least=8, at_most=MAX_VOCAB)
    check_size("sample", "W", sizes["W"], at_least=1, at_most=_DRAW_THREADS)
    for name, expected in (
        ("W-1", sizes["W"] - 1),
        ("words", -(-vocab_size // 32)),
        ("groups", -(-vocab_size // _GROUP)),
        ("tiles", num_tiles),
    ):
        if sizes[name] != expected:
            raise ContractError(f"sample: {name} is {sizes[name]}, expected {expected}")
    scan_history = tuple(Buffer(b.name, b.tensor, Access.READ, b.shape, b.dtype) for b in history[:2])
    device.launch(
        Launch(
            program(),
            "sample_scan",
            grid=(num_tiles, sizes["S"], 1),
            block=(_SCAN_THREADS, 1, 1),
            arguments=(
                *step,
                *parameters,
                *scan_history,
                *lists,
                *(Buffer(b.name, b.tensor, Access.WRITE, b.shape, b.dtype) for b in passed_on),
                count,
                int32("vocab_size", vocab_size),
                int32("max_biases", sizes["B"]),
                int32("max_bad_words", sizes["N"]),
                int32("word_tokens", sizes["W"]),
                int32("max_endings", sizes["Z"]),
            ),
            overlaps_previous=True,
        )
    )
    adjusted_buffer, *others = (Buffer(b.name, b.tensor, Access.READ, b.shape, b.dtype) for b in passed_on)
    device.launch(
        Launch(
            program(),
            "sample_draw",
            grid=(sizes["S"], 1, 1),
            block=(_DRAW_THREADS, 1, 1),
            arguments=(
                step[0],
                adjusted_buffer,
                *step[1:4],
                *parameters,
                *others,
                *history,
                *results,
                count,
                int32("vocab_size", vocab_size),
                int32("num_tiles", num_tiles),
                int32("word_tokens", sizes["W"]),
            ),
            overlaps_previous=True,
        )
    )


def program() -> Program:
    """The kernels for every size."""
    return Program.of("sample")


# Rows of the cases: what differs from a plain greedy row. `words` and `endings` are filled in by make_inputs.
_ROWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "random": {"temperature": 0.8},
    "hot": {"temperature": 20.0},
    "top-k": {"temperature": 1.0, "top_k": 7},
    "top-k 1": {"temperature": 1.0, "top_k": 1},
    "top-p": {"temperature": 0.9, "top_p": 0.8},
    "top-p tiny": {"temperature": 0.9, "top_p": 1e-6},
    "min-p": {"temperature": 1.1, "min_p": 0.05},
    "all filters": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "top-k beyond the groups": {"temperature": 1.0, "top_k": 1500, "top_p": 0.95},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "rewards": {"repetition_penalty": 0.7, "frequency_penalty": -0.3},
    "bias": {"temperature": 0.7, "top_p": 0.9, "num_biases": 5},
    "mask": {"temperature": 1.0, "mask": "half"},
    "narrow mask": {"mask": "two"},
    "bad words": {"temperature": 0.5, "num_bad_words": 4},
    "endings": {"num_endings": 3, "min_tokens": 4},
    "endings allowed": {"num_endings": 3, "min_tokens": 1},
    "nothing left": {"temperature": 1.0, "top_k": 5, "mask": "endings", "num_endings": 3, "min_tokens": 4},
}
_MAX_BIASES, _MAX_BAD_WORDS, _WORD_TOKENS, _MAX_ENDINGS = 8, 6, 4, 4
_EVERYTHING = tuple(_ROWS)
_FILTERED = ("random", "top-k", "top-p", "min-p", "top-k beyond the groups")
CASES = (
    Case("NeMo, top-p", {"S": 64, "V": 131072}, {"rows": ("top-p",)}, is_emulated=False, is_timed=True),
    Case("NeMo, greedy", {"S": 256, "V": 131072}, {"rows": ("greedy",)}, is_emulated=False, is_timed=True),
    Case("every kind", {"S": len(_EVERYTHING), "V": 4616}, {"rows": _EVERYTHING}),
    Case("flat", {"S": len(_FILTERED), "V": 2400}, {"rows": _FILTERED, "logits": "flat"}),
    Case("equal", {"S": len(_FILTERED), "V": 2400}, {"rows": _FILTERED, "logits": "equal"}),
    Case("many equal", {"S": 4, "V": 4096}, {"rows": ("greedy", "top-k", "top-p", "all filters"), "logits": "coarse"}),
    Case("peaked", {"S": 3, "V": 4104}, {"rows": ("top-k", "top-p", "min-p"), "logits": "peaked"}),
    Case("smallest", {"S": 3, "V": 8}, {"rows": ("greedy", "random", "top-p")}),
    Case("NeMo rows", {"S": 3, "V": 131072}, {"rows": ("random", "top-p", "all filters")}),
    Case("largest", {"S": 2, "V": 262144}, {"rows": ("greedy", "top-k")}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """A batch whose rows are the case's kinds in turn, in slots of any order, each with some history."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, vocab_size = case.sizes["S"], case.sizes["V"]
    num_slots = num_rows + 2
    slots = torch.randperm(num_slots, generator=generator)[:num_rows]
    inputs = _empty_state(num_slots, vocab_size)
    kinds = [_ROWS[case.options["rows"][row % len(case.options["rows"])]] for row in range(num_rows)]
    masks = [torch.ones(vocab_size, dtype=torch.bool)]
    mask_rows = torch.full((num_rows,), -1, dtype=torch.int32)
    logits = make_logits(num_rows, vocab_size, case.options.get("logits", "normal"), generator)
    for row, (slot, kind) in enumerate(zip(slots.tolist(), kinds, strict=True)):
        best = logits[row].topk(min(8, vocab_size)).indices.int()
        _set_parameters(inputs, slot, kind, vocab_size, int(torch.randint(2**62, (1,), generator=generator)))
        _add_lists(inputs, slot, best, generator)
        inputs["num_outputs"][slot] = 2
        history = torch.randint(vocab_size, (20,), generator=generator)
        inputs["histories"][slot, history[:10]] = IN_PROMPT
        inputs["histories"][slot, history[8:]] += torch.randint(1, 4, (12,), generator=generator, dtype=torch.int32)
        inputs["histories"][slot, best[:2].long()] |= 3
        if "mask" in kind:
            mask_rows[row] = len(masks)
            masks.append(_mask(kind["mask"], best, vocab_size, generator))
    return inputs | {
        "logits": logits,
        "slots": slots.int(),
        "positions": torch.randint(131072, (num_rows,), generator=generator, dtype=torch.int32),
        "mask_rows": mask_rows,
        "masks": packed_masks(torch.stack(masks)),
        **make_workspace(num_rows, vocab_size, torch.device("cpu")),
        "token_ids": torch.empty(num_rows, dtype=torch.int32),
        "is_finite": torch.empty(num_rows, dtype=torch.int32),
        "num_rows": torch.tensor([num_rows], dtype=torch.int32),
    }


def packed_masks(is_allowed: torch.Tensor) -> torch.Tensor:
    """Masks [n, V] bool as [n, ceil(V / 32)] INT32."""
    padded = torch.nn.functional.pad(is_allowed, (0, -is_allowed.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (padded.long() << torch.arange(32)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _empty_state(num_slots: int, vocab_size: int) -> Inputs:
    reals = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    return {
        "reals": reals.repeat(num_slots, 1),
        "integers": torch.tensor([[0, vocab_size, 0, -1]]).repeat(num_slots, 1),
        "counts": torch.zeros(num_slots, len(COUNTS), dtype=torch.int32),
        "bias_ids": torch.zeros(num_slots, _MAX_BIASES, dtype=torch.int32),
        "bias_values": torch.zeros(num_slots, _MAX_BIASES),
        "bad_words": torch.full((num_slots, _MAX_BAD_WORDS, _WORD_TOKENS), -1, dtype=torch.int32),
        "ending_ids": torch.zeros(num_slots, _MAX_ENDINGS, dtype=torch.int32),
        "histories": torch.zeros(num_slots, vocab_size, dtype=torch.int32),
        "num_outputs": torch.zeros(num_slots, dtype=torch.int32),
        "recent_ids": torch.full((num_slots, _WORD_TOKENS - 1), -1, dtype=torch.int32),
        "last_ids": torch.zeros(num_slots, dtype=torch.int32),
    }


def _set_parameters(inputs: Inputs, slot: int, kind: dict[str, Any], vocab_size: int, seed: int) -> None:
    for column, name in enumerate(REALS):
        if name in kind:
            inputs["reals"][slot, column] = kind[name]
    for column, name in enumerate(INTEGERS):
        if name in kind:
            inputs["integers"][slot, column] = min(kind[name], vocab_size) if name == "top_k" else kind[name]
    inputs["integers"][slot, 0] = seed
    for column, name in enumerate(COUNTS):
        inputs["counts"][slot, column] = kind.get(name, 0)


def _add_lists(inputs: Inputs, slot: int, best: torch.Tensor, generator: torch.Generator) -> None:
    """Biases and endings of likely ids; words that match with no, one and two ids before, and one that does not."""
    vocab_size = inputs["histories"].shape[1]
    inputs["bias_ids"][slot] = torch.randperm(vocab_size, generator=generator)[:_MAX_BIASES].int()
    inputs["bias_values"][slot] = 6 * torch.randn(_MAX_BIASES, generator=generator)
    inputs["ending_ids"][slot] = best[:_MAX_ENDINGS]
    inputs["recent_ids"][slot] = torch.tensor([-1, 1, 2])
    ids = best.tolist()
    words = ([ids[0]], [2, ids[1]], [1, 2, ids[2]], [2, 1, ids[3]])
    for index, word in enumerate(words):
        inputs["bad_words"][slot, index, _WORD_TOKENS - len(word) :] = torch.tensor(word)


def _mask(kind: str, best: torch.Tensor, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    if kind == "half":
        return torch.rand(vocab_size, generator=generator) < 0.5
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[(best[-2:] if kind == "two" else best[:3]).long()] = True
    return allowed


def cost(case: Case) -> Cost:
    """Each row of logits is read once."""
    num_logits = case.sizes["S"] * case.sizes["V"]
    return Cost(flops=10 * num_logits, bytes=4 * num_logits)


_SCRATCH = ("adjusted", "group_maxima", "tile_is_finite", "tile_scores", "tile_ties", "tile_fallbacks")
_RESULTS = ("token_ids", "is_finite", "histories", "num_outputs", "recent_ids", "last_ids")
OP = Op(
    name="sample",
    formula="id = argmax over kept ids of x / temperature + noise(seed, position, id)",
    launch=sample,
    make_inputs=make_inputs,
    reference=sample_reference,
    bounds=lambda inputs, expected: dict.fromkeys(_RESULTS, 0.0),
    cost=cost,
    cases=CASES,
    programs=(program(),),
    outputs=("token_ids", "is_finite"),
    updated=("histories", "num_outputs", "recent_ids", "last_ids"),
    scratch=_SCRATCH,
    rows=("logits", "slots", "positions", "mask_rows", "token_ids", "is_finite", *_SCRATCH),
)
