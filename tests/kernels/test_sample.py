"""Sampling: the same ids as the PyTorch sampler, step after step, under every rule; ties, and logits that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.engine.plan import SlotStart
from backend.engine.request import SamplingParams
from backend.runner.noise import gumbel_noise as torch_noise
from backend.runner.noise import row_keys
from backend.runner.sampler import Sampler
from kernels.check import check_case
from kernels.errors import ContractError
from kernels.log_probs import make_logits
from kernels.op import Case, Inputs
from kernels.sample import IN_PROMPT, OP, make_inputs, packed_masks, sample
from kernels.sample_reference import gumbel_noise
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

_WAIT = "hw::griddep_wait();\n  "
_BEGIN = "hw::griddep_launch();\n  if (row_index >= *num_rows) return;\n  const int slot = slots[row_index], "
MUTANTS = (
    Mutant.of("scan: dropped dependency wait", "sample.cu", f"{_WAIT}{_BEGIN}mask_row", f"{_BEGIN}mask_row"),
    Mutant.of("draw: dropped dependency wait", "sample.cu", f"{_WAIT}{_BEGIN}outputs", f"{_BEGIN}outputs"),
    Mutant.of(
        "scan: dropped barrier before biases meet the tile",
        "sample.cu",
        "    __syncthreads();\n    for (int i = t; i < row.counts[NUM_BIASES]",
        "    for (int i = t; i < row.counts[NUM_BIASES]",
    ),
    Mutant.of(
        "scan: dropped barrier after the biases",
        "sample.cu",
        "    __syncthreads();\n    if (row.may_forbid(outputs)) {",
        "    if (row.may_forbid(outputs)) {",
    ),
    Mutant.of(
        "scan: dropped barrier after what is forbidden",
        "sample.cu",
        "      __syncthreads();\n    }\n#pragma unroll\n    for (int j = 0; j < STEPS; j++) {\n      const int place",
        "    }\n#pragma unroll\n    for (int j = 0; j < STEPS; j++) {\n      const int place",
    ),
    Mutant.of(
        "scan: dropped barrier before the warps' flags and bounds are read",
        "sample.cu",
        "  __syncthreads();\n  if (t == 0) {\n    u32 all = 1;\n    for (int i = 0; i < SCAN_THREADS / 32; i++)",
        "  if (t == 0) {\n    u32 all = 1;\n    for (int i = 0; i < SCAN_THREADS / 32; i++)",
    ),
    Mutant.of(
        "best of the block: dropped barrier before its places are written",
        "select.cuh",
        "  __syncthreads();  // whoever used values and ties before is done\n",
    ),
    Mutant.of(
        "best of the block: dropped barrier before its places are read",
        "select.cuh",
        "    ties[warp] = tie;\n  }\n  __syncthreads();\n",
        "    ties[warp] = tie;\n  }\n",
    ),
    Mutant.of(
        "draw: dropped barrier after the list is emptied",
        "sample.cu",
        "      if (t == 0) work.list_size = 0;\n      __syncthreads();\n",
        "      if (t == 0) work.list_size = 0;\n",
    ),
    Mutant.of(
        "draw: dropped barrier before the rest's sums are read",
        "sample.cu",
        "work.warp_masses[t >> 5] = rest;\n      __syncthreads();\n",
        "work.warp_masses[t >> 5] = rest;\n",
    ),
    Mutant.of(
        "draw: dropped barrier before the recent ids move",
        "sample.cu",
        "  __syncthreads();\n  if (keeps_recent) recent[t] = moved;",
        "  if (keeps_recent) recent[t] = moved;",
    ),
    Mutant.of("noise of the next token", "noise.cuh", "((u64)token_id + 1) * GAMMA", "((u64)token_id + 2) * GAMMA"),
    Mutant.of("bound too low", "noise.cuh", "GUMBEL_BOUND_EXCESS = 0.3267f", "GUMBEL_BOUND_EXCESS = -3.0f"),
    Mutant.of("top-p looks no further than its list", "sample.cu", "!has_top_k && kept.count", "false && kept.count"),
    Mutant.of("the rest has no mass", "sample.cu", "else if (!has_top_k) rest += mass_of(entry);", ""),
)
_VOCAB = 1032


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_the_noise_is_the_pytorch_samplers() -> None:
    ids = np.arange(5000)
    keys = row_keys(np.array([2**64 - 5], dtype=np.uint64), np.array([131_071]))
    expected = torch_noise(torch.from_numpy(keys), torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(gumbel_noise(-5, 131_071, ids), expected, rtol=1e-14, atol=1e-14)


# Everything SamplingParams has, each alone and together.
_PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=2**64 - 1),
    SamplingParams(temperature=0.01, seed=1),
    SamplingParams(temperature=100.0, seed=2),
    SamplingParams(temperature=0.9, top_k=5, seed=3),
    SamplingParams(temperature=0.9, top_p=0.7, seed=4),
    SamplingParams(temperature=1.5, top_p=0.999, seed=5),
    SamplingParams(temperature=0.9, min_p=0.1, seed=6),
    SamplingParams(temperature=2.0, top_k=30, top_p=0.9, min_p=0.01, seed=7),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3),
    SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=0.8, presence_penalty=-1.0, seed=8),
    SamplingParams(logit_bias=((5, 30.0), (9, -100.0), (1031, 29.5)), temperature=0.7, seed=9),
    SamplingParams(bad_words=((4,), (4, 7), (7, 4, 11), (3, 3))),
    SamplingParams(temperature=1.0, seed=10),
    SamplingParams(
        temperature=0.5, top_k=3, repetition_penalty=1.2, bad_words=((1, 2),), logit_bias=((2, 3.0),), seed=11
    ),
)


def test_ids_are_the_pytorch_samplers_step_after_step() -> None:
    generator = torch.Generator().manual_seed(7)
    num_rows = len(_PARAMS)
    sampler = Sampler(num_rows, _VOCAB, torch.device("cpu"))
    inputs = make_inputs(Case("steps", {"S": num_rows, "V": _VOCAB}, {"rows": ("greedy",)}), seed=0)
    inputs |= _empty_history(num_rows, max_word_tokens=3)
    slots = torch.randperm(num_rows, generator=generator)
    for slot, params in enumerate(_PARAMS):
        prompt = tuple(torch.randint(_VOCAB, (9,), generator=generator).tolist())
        start = SlotStart(
            params, prompt, min_tokens=2 if slot % 3 == 0 else 0, ending_ids=(3, 900) if slot % 3 == 0 else ()
        )
        sampler.start(slot, start)
        _start(inputs, slot, start)
    for step in range(6):
        logits = make_logits(num_rows, _VOCAB, "flat" if step == 4 else "normal", generator)
        logits[:, [2, 3, 4, 7, 11]] += 12  # so that bad words and endings matter, and ids repeat
        is_allowed = torch.rand(2, _VOCAB, generator=generator) < 0.3
        is_allowed[1] = False
        is_allowed[1, [3, 900]] = True
        masks = packed_masks(is_allowed)
        positions = torch.arange(num_rows) + 100 + step
        inputs |= {"slots": slots.int(), "positions": positions.int(), "logits": logits, "masks": masks}
        inputs["mask_rows"] = torch.full((num_rows,), -1, dtype=torch.int32)
        inputs["mask_rows"][[2, 5]] = torch.tensor([0, 1], dtype=torch.int32)
        host_masks = {int(slots[row]): masks[i].numpy() for i, row in enumerate((2, 5))}
        sample(EmulatedDevice(PLAIN[step % 4]), **inputs)
        draw = sampler.sample(logits.clone(), slots.numpy(), positions.numpy(), host_masks)
        assert inputs["token_ids"].tolist() == draw.token_ids.tolist(), step
        assert inputs["is_finite"].tolist() == [1] * num_rows
        assert inputs["last_ids"].tolist() == sampler.last_ids.tolist()


def test_many_draws_are_the_pytorch_samplers() -> None:
    generator = torch.Generator().manual_seed(8)
    params = [SamplingParams(temperature=0.7 + 0.01 * i, top_p=(1.0, 0.9)[i % 2], seed=i) for i in range(60)]
    sampler = Sampler(60, _VOCAB, torch.device("cpu"))
    inputs = make_inputs(Case("draws", {"S": 60, "V": _VOCAB}, {"rows": ("greedy",)}), seed=0)
    inputs |= _empty_history(60, max_word_tokens=1)
    for slot in range(60):
        sampler.start(slot, SlotStart(params[slot], ()))
        _start(inputs, slot, SlotStart(params[slot], ()))
    logits = make_logits(60, _VOCAB, "normal", generator)
    positions = torch.arange(60) * 2000
    inputs |= {"slots": torch.arange(60).int(), "positions": positions.int(), "logits": logits}
    sample(EmulatedDevice(PLAIN[0]), **inputs)
    draw = sampler.sample(logits.clone(), np.arange(60), positions.numpy(), {})
    assert inputs["token_ids"].tolist() == draw.token_ids.tolist()
    assert len(set(inputs["token_ids"].tolist())) > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_reported_and_an_id_is_drawn(value: float) -> None:
    inputs = make_inputs(Case("bad", {"S": 3, "V": 4104}, {"rows": ("greedy", "random", "all filters")}), seed=1)
    inputs["logits"][1, 4100] = value
    inputs["logits"][2] = value
    sample(EmulatedDevice(CHECKED[0]), **inputs)
    assert inputs["is_finite"].tolist() == [1, 0, 0]
    assert all(0 <= token_id < 4104 for token_id in inputs["token_ids"].tolist())
    assert inputs["token_ids"][0] == inputs["logits"][0].argmax()
    if value != float("inf"):
        assert inputs["token_ids"][1] != 4100
        assert inputs["token_ids"][2] == 0


def test_rows_from_num_rows_on_are_left_alone() -> None:
    inputs = make_inputs(Case("part", {"S": 3, "V": 512}, {"rows": ("penalties",)}), seed=1)
    histories, slot = inputs["histories"].clone(), int(inputs["slots"][2])
    inputs["token_ids"].fill_(-7)
    inputs["num_rows"][0] = 2
    sample(EmulatedDevice(CHECKED[0]), **inputs)
    assert (inputs["token_ids"] == -7).tolist() == [False, False, True]
    assert inputs["num_outputs"][inputs["slots"].long()].tolist() == [3, 3, 2]
    assert torch.equal(inputs["histories"][slot], histories[slot])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"masks": torch.zeros(1, 15, dtype=torch.int32)}, "sample: words is 15, expected 16"),
        ({"recent_ids": torch.zeros(3, 9, dtype=torch.int32)}, "sample: W-1 is 9, expected 3"),
        ({"group_maxima": torch.zeros(1, 3, dtype=torch.int32)}, "sample: groups is 3, expected 4"),
        ({"positions": torch.zeros(1)}, "sample: positions has dtype torch.float32, expected torch.int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, torch.Tensor], message: str) -> None:
    inputs = make_inputs(Case("odd", {"S": 1, "V": 512}, {"rows": ("greedy",)}), seed=1)
    with pytest.raises(ContractError, match=message):
        sample(EmulatedDevice(), **inputs | changed)


def _empty_history(num_slots: int, max_word_tokens: int) -> Inputs:
    return {
        "reals": torch.zeros(num_slots, 6, dtype=torch.float64),
        "integers": torch.zeros(num_slots, 4, dtype=torch.int64),
        "counts": torch.zeros(num_slots, 3, dtype=torch.int32),
        "bias_ids": torch.zeros(num_slots, 4, dtype=torch.int32),
        "bias_values": torch.zeros(num_slots, 4),
        "bad_words": torch.full((num_slots, 4, max_word_tokens), -1, dtype=torch.int32),
        "ending_ids": torch.zeros(num_slots, 2, dtype=torch.int32),
        "histories": torch.zeros(num_slots, _VOCAB, dtype=torch.int32),
        "num_outputs": torch.zeros(num_slots, dtype=torch.int32),
        "recent_ids": torch.full((num_slots, max_word_tokens - 1), -1, dtype=torch.int32),
        "last_ids": torch.zeros(num_slots, dtype=torch.int32),
    }


def _start(inputs: Inputs, slot: int, start: SlotStart) -> None:
    params = start.sampling
    inputs["reals"][slot] = torch.tensor(
        [
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        ],
        dtype=torch.float64,
    )
    seed = params.seed - 2**64 if params.seed >= 2**63 else params.seed
    inputs["integers"][slot] = torch.tensor([seed, params.top_k or _VOCAB, start.min_tokens, -1])
    inputs["counts"][slot] = torch.tensor([len(params.logit_bias), len(params.bad_words), len(start.ending_ids)])
    for index, (token_id, value) in enumerate(params.logit_bias):
        inputs["bias_ids"][slot, index], inputs["bias_values"][slot, index] = token_id, value
    for index, word in enumerate(params.bad_words):
        inputs["bad_words"][slot, index, -len(word) :] = torch.tensor(word)
    inputs["ending_ids"][slot, : len(start.ending_ids)] = torch.tensor(start.ending_ids, dtype=torch.int32)
    inputs["histories"][slot, list(start.prompt_token_ids)] = IN_PROMPT
