"""What is run before anything is served: every shape and every program a server needs, and no trace in what comes later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from backend.checkpoint.model_config import read_model_config
from backend.engine.plan import PlanRow, SlotStart, StepPlan
from backend.engine.request import SamplingParams
from backend.phases import Phases
from backend.runner.cuda.attention import StepShape, shape_of
from backend.runner.cuda.programs import programs_of
from backend.runner.cuda.runner import CudaRunner
from backend.runner.cuda.step_tokens import StepTokens, step_widths, width_for
from backend.runner.cuda.warm_up import step_sizes
from backend.runner.placement import choose_dtypes
from backend.runner.select import make_runner
from backend.runner.warm_up import Limits, StepSize, run_steps
from backend.settings import Settings
from kernels.arguments import Access, Buffer
from kernels.launch import Device, Launch, RecordedGraph
from kernels.program import Program
from kernels.recording import RecordingDevice
from tests.checkpoints import make_checkpoint
from tests.emulator.device import PLAIN, EmulatedDevice
from tests.emulator.marks import needs_emulator
from tests.quantised_checkpoints import SCHEMES, quantise_checkpoint
from tests.unit.runner.test_cuda_runner import SIZES, Story, assert_same, prompt, run

MAX_NUM_SEQS, MAX_MODEL_LEN, NUM_PAGES = 6, 700, 20
LIMITS = Limits(MAX_NUM_SEQS, MAX_MODEL_LEN, NUM_PAGES, SIZES["vocab_size"])


class IdleDevice(RecordingDevice):
    """Computes nothing: kernels write zeros, and that logits were finite."""

    def launch(self, launch: Launch) -> None:
        super().launch(launch)
        for argument in launch.arguments:
            if isinstance(argument, Buffer) and argument.tensor is not None and argument.access is Access.WRITE:
                argument.tensor.view(torch.uint8).fill_(argument.name == "is_finite")

    @property
    def programs(self) -> set[Program]:
        return {launch.program for launch in self.launches}


class CountingDevice(EmulatedDevice):
    """Knows how often something was captured."""

    num_captures = 0

    def capture(self, record: Callable[[], None]) -> RecordedGraph:
        self.num_captures += 1
        return super().capture(record)


def load(folder: Path, device: Device, max_step_tokens: int, **dtypes: Any) -> CudaRunner:
    return CudaRunner.load(
        folder,
        device,
        num_pages=NUM_PAGES,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        max_step_tokens=max_step_tokens,
        **dtypes,
    )


def warm_up(runner: CudaRunner) -> int:
    return run_steps(runner, step_sizes(MAX_NUM_SEQS, runner.max_step_tokens), LIMITS)


@pytest.mark.parametrize(
    ("scheme", "dtypes"),
    [
        ("", {"weight_dtype": "bf16", "kv_dtype": "bf16"}),
        ("", {"weight_dtype": "fp8", "head_dtype": "fp8", "kv_dtype": "fp8"}),
        ("fp8 static", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_step_tokens", [12, 600])
def test_the_programs_of_a_model_are_those_that_its_steps_launch(
    tmp_path: Path, scheme: str, dtypes: dict[str, str], max_step_tokens: int
) -> None:
    folder = make_checkpoint(tmp_path / "source", **SIZES | {"num_layers": 2})
    if scheme:
        quantise_checkpoint(folder, tmp_path / "quantised", SCHEMES[scheme])
        folder = tmp_path / "quantised"
    config, device = read_model_config(folder), IdleDevice()
    warm_up(load(folder, device, max_step_tokens, **dtypes))
    weight_format, kv = choose_dtypes(
        torch.bfloat16,
        torch.float8_e4m3fn,
        dtypes.get("weight_dtype", "auto"),
        dtypes.get("kv_dtype", "auto"),
        dtypes.get("head_dtype", "auto"),
        config.quantization,
    )
    programs = programs_of(
        config,
        weight_format,
        is_fp8_kv=kv == torch.float8_e4m3fn,
        max_num_seqs=MAX_NUM_SEQS,
        max_step_tokens=max_step_tokens,
    )
    assert len(set(programs)) == len(programs)
    assert set(programs) == device.programs


@needs_emulator
def test_nothing_is_captured_afterwards_and_results_are_as_ever(tmp_path: Path) -> None:
    folder, device = make_checkpoint(tmp_path, **SIZES), CountingDevice(PLAIN[0])
    cold, warm = load(folder, EmulatedDevice(PLAIN[0]), 16), load(folder, device, 16)
    num_steps = warm_up(warm)
    # A graph for each step but the forced one, and a head and a draw for each width of them.
    num_captures = num_steps - 1 + 2 * len(step_widths(MAX_NUM_SEQS))
    assert num_steps == len(list(step_sizes(MAX_NUM_SEQS, 16)))
    assert device.num_captures == num_captures

    def stories() -> list[Story]:
        params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, repetition_penalty=1.2)
        return [
            Story(prompt(1, 20), 2, (9,), chunks=(1, 12, 7), params=params),
            Story(prompt(2, 12), 0, (1,), chunks=(3, 1, 1, 7)),
        ]

    for found, expected in zip(stories(), stories(), strict=True):
        run(warm, found)
        run(cold, expected)
        assert_same(found, expected)
    run(warm, *stories())
    warm.launch(StepPlan(0, (forced_row(7),))).draw({})
    assert device.num_captures == num_captures


def forced_row(num_tokens: int) -> PlanRow:
    start = SlotStart(SamplingParams(), (1,))
    return PlanRow(0, 1, num_tokens, (1,) * num_tokens, (0,), True, start, num_forced=num_tokens - 1)


@pytest.mark.parametrize(("max_num_seqs", "max_step_tokens"), [(1, 16), (12, 16), (16, 16), (300, 520)])
def test_each_step_has_a_shape_of_its_own_and_none_is_missing(max_num_seqs: int, max_step_tokens: int) -> None:
    def shape(size: StepSize) -> StepShape:
        num_tokens = size.num_generated + size.num_prompt_tokens
        tokens = SimpleNamespace(
            token_ids=range(num_tokens), num_generated=size.num_generated, chunks=range(size.num_prompt_tokens)
        )
        return shape_of(cast(StepTokens, tokens), max_step_tokens)

    *sizes, forced = step_sizes(max_num_seqs, max_step_tokens)
    assert shape(replace(forced, num_generated=forced.num_generated + forced.num_forced)) in map(shape, sizes)
    shapes = [shape(size) for size in sizes if size.is_guided]
    assert len(set(shapes)) == len(shapes)
    # Those of generated tokens alone also as one graph, with a head and a draw as wide as the step's rows want.
    alone = [size for size in sizes if not size.is_guided]
    graphs = {(shape(size), width_for(size.num_generated, max_num_seqs)) for size in alone}
    assert len(graphs) == len(alone)
    assert graphs == {
        (shape(StepSize(number, 0)), width_for(number, max_num_seqs))
        for number in range(1, min(max_num_seqs, max_step_tokens) + 1)
    }
    possible = {
        shape(StepSize(num_generated, num_prompt))
        for num_generated in range(max_num_seqs + 1)
        for num_prompt in range(max_step_tokens - num_generated + 1)
        # A prompt has a slot of its own.
        if num_generated + num_prompt > 0 and (num_generated < max_num_seqs or num_prompt == 0)
    }
    assert set(shapes) == possible


def test_what_the_limits_do_not_allow_is_left_out(tmp_path: Path) -> None:
    runner = load(make_checkpoint(tmp_path, **SIZES), IdleDevice(), 80)
    few = Limits(2, 40, 2, SIZES["vocab_size"])
    assert (
        run_steps(runner, [StepSize(3, 0), StepSize(2, 0), StepSize(0, 78), StepSize(0, 79), StepSize(1, 60)], few) == 2
    )


def test_a_server_with_the_cuda_runner_says_where_its_start_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs are asked for beside the weights; the phases are in the order in which they end."""
    folder = make_checkpoint(tmp_path, **SIZES)
    device, built = IdleDevice(), list[Program]()

    def build(programs: tuple[Program, ...], report: Callable[[str], None]) -> int:
        built.extend(programs)
        return 0

    monkeypatch.setattr("kernels.driver.CudaDevice", lambda: device)
    monkeypatch.setattr("kernels.build.build", build)
    settings = Settings(
        checkpoint=str(folder), runner="cuda", weight_dtype="bf16", kv_dtype="bf16", kv_cache_tokens=NUM_PAGES * 64,
        max_num_seqs=MAX_NUM_SEQS, max_step_tokens=16, max_model_len=MAX_MODEL_LEN,
    )  # fmt: skip
    phases = Phases()
    served = make_runner(settings, lambda what, done, total: None, phases)
    assert list(phases.fields()["fields"]["phases_s"]) == ["device", "weights", "memory", "kernels", "warm-up"]
    assert set(built) == device.programs
    assert served.description["warm_up"] == "7 of 7 steps"
