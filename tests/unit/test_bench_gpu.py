"""`make bench-gpu` without a GPU: the whole command on the emulator, and what only a GPU would run with stand-ins."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from backend.plan import NEMO_12B as NEMO
from kernels.clock import GpuClock
from kernels.launch import Launch
from kernels.ops import select_ops
from kernels.program import Program
from tests.bench import bench_runner_host
from tests.bench.conditions import RESULTS
from tests.bench.gpu import __main__ as command
from tests.bench.gpu.floor import decode_bytes
from tests.bench.gpu.models import FP8
from tests.bench.gpu.peers import decode_attention_peers, linear_peers, usable_peers
from tests.bench.gpu.prefill_peers import prefill_attention_peers
from tests.bench.gpu.timeline import Span, named_by_launches
from tests.emulator.device import PLAIN, EmulatedDevice
from tests.emulator.marks import needs_emulator


def run(*arguments: str) -> int:
    return command.main(arguments)


@needs_emulator
def test_the_whole_command_at_toy_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "emulated.json"
    assert run("--emulated", "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert command.EMULATED in lines[0]
    assert command.EMULATED in lines[-1]
    results = json.loads(file.read_text())
    assert results["machine"] == {"gpu": command.EMULATED}
    assert [(cell["batch"], cell["context"]) for cell in results["decode_steps"]] == [(1, 70), (3, 130)]
    for cell in results["decode_steps"]:
        exposed = cell["exposed_us"]
        assert {"skinny_gemm 768x256", "attention_partials", "sample_draw", "idle"} <= exposed.keys()
        assert all(us >= 0 for us in exposed.values())
        assert cell["share_of_floor"] > 0
        assert cell["num_steps"] == 2
    assert [(prompt["length"], prompt["chunk"]) for prompt in results["prompts"]] == [(150, 150), (150, 64)]
    assert all(prompt["first_token_ms"] > 0 and prompt["share_of_floor"] > 0 for prompt in results["prompts"])
    bf16, fp8 = (
        [cell["error"] for cell in results["long_context"] if cell["kv_dtype"] == name] for name in ("bf16", "fp8")
    )
    assert len(bf16) == len(fp8) == 2 * 2 * 2, "two contexts, lengths and kernels"
    assert all(0 < error < its_fp8 / 2 < 0.1 for error, its_fp8 in zip(bf16, fp8, strict=True))
    timed = {entry["op"] for entry in results["kernels"]}
    assert timed == {op.name for op in select_ops(None)} - {"read_bandwidth"}
    peers = {name for entry in results["kernels"] for name in entry["peers_us"]}
    assert {"cuBLASLt rowwise", "cuBLASLt tensorwise", "SDPA"} <= peers


def test_the_emulator_writes_nothing_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--emulated", "--json", str(RESULTS / "gpu.json")) == 2
    assert "the emulator gives none" in capsys.readouterr().err


@needs_emulator
def test_when_the_time_is_over_nothing_new_begins(tmp_path: Path) -> None:
    file = tmp_path / "emulated.json"
    assert run("--emulated", "--json", str(file), "--seconds", "0") == 0
    results = json.loads(file.read_text())
    entries = results["kernels"] + results["decode_steps"] + results["prompts"]
    assert all(entry["skipped"] == "no time left" for entry in entries)
    assert results["long_context"] == []


class FakeGpu(EmulatedDevice):
    """Stands for a CudaDevice; its kernels run on the CPU."""

    def __init__(self) -> None:
        super().__init__(PLAIN[0])


class FakeEvent:
    num_recorded = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.num_recorded += 1
        self.time = FakeEvent.num_recorded

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.time - self.time)


class FakeProfile:
    """A step of which the profiler saw a copy and, of each of our kernels, one run of 2 us."""

    def __init__(self, activities: list[Any]) -> None:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self) -> FakeProfile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[Any]:
        def event(name: str, start: float, end: float, kind: str = "CUDA") -> Any:
            span = SimpleNamespace(start=start, end=end)
            return SimpleNamespace(name=name, time_range=span, device_type=SimpleNamespace(name=kind))

        return [event("Memcpy HtoD", 0, 1), event("cudaGraphLaunch", 0, 50, "CPU"), event("embedding", 2, 4)]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a stand-in")
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.setattr(command, "CudaDevice", FakeGpu)
    monkeypatch.setattr(command, "GpuClock", lambda device: GpuClock(device, num_samples=2, flush_bytes=8192))
    monkeypatch.setattr(command, "FULL", command.SMALL)
    with mock.patch.object(command, "build") as build:
        yield
        assert len(build.call_args.args[0]) > 30


@needs_emulator
def test_what_runs_on_a_gpu_runs_with_stand_ins(fake_gpu: None, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    before = FakeEvent.num_recorded
    assert run("--json", str(file)) == 0
    results = json.loads(file.read_text())
    assert results["machine"].keys() == {
        *("gpu", "num_sms", "driver_and_clocks", "torch", "nvrtc", "python", "commit", "date")
    }
    assert results["decode_steps"][0]["exposed_us"] == {"embedding": 2, "Memcpy HtoD": 1, "idle": 1}
    assert FakeEvent.num_recorded - before > 2 * 7 * len(results["kernels"])
    assert {entry["median_us"] for entry in results["kernels"]} == {1000.0}


@needs_emulator
def test_a_peer_becomes_a_graph_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.gpu.kernel_timings import replayed

    steps: list[str] = []
    graph = SimpleNamespace(replay=lambda: steps.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured: contextlib.nullcontext(captured))
    run = replayed(lambda: steps.append("run"), SimpleNamespace(torch_device=torch.device("cuda", 0)))
    run()
    assert steps == ["run", "replay"]


def test_what_a_step_costs_the_host_needs_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    bench_runner_host.main(["--sequences", "1", "3", "--steps", "70", "--no-results"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["sequences", "---:", "1", "3"]
    assert all(float(line.split("|")[2]) > 0 for line in lines[2:])


def test_spans_are_named_by_what_was_launched() -> None:
    def launch(kernel: str, **definitions: int) -> Launch:
        return Launch(Program.of(kernel, **definitions), kernel, (1, 1, 1), (1, 1, 1), ())

    launches = [
        launch("skinny_gemm", OUTPUTS=64, INPUTS=128),
        launch("rmsnorm"),
        launch("skinny_gemm", OUTPUTS=8, INPUTS=4),
    ]
    spans = [Span("skinny_gemm", 5, 6), Span("copy", 0, 1), Span("skinny_gemm", 1, 2), Span("rmsnorm", 2, 5)]
    names = {span.start_us: span.name for span in named_by_launches(spans, launches)}
    assert names == {0: "copy", 1: "skinny_gemm 64x128", 2: "rmsnorm", 5: "skinny_gemm 8x4"}
    assert named_by_launches(spans, launches[:2]) == spans


def test_the_floor_of_mistral_nemo() -> None:
    """The bytes of a step, by hand: 272,629,760 of FP8 a layer, a BF16 head of 1.342 GB, 81,920 of FP8 KV a token."""
    assert decode_bytes(NEMO, FP8, 1, 1, 0) == 40 * 272_629_760 + 2 * 131072 * 5120
    assert decode_bytes(NEMO, FP8, 1, 64, 4096) - decode_bytes(NEMO, FP8, 1, 1, 0) == 64 * 4096 * 81_920


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [T, H, D], keys and values [T, length, K, D]."""
    group = q.shape[1] // k.shape[2]
    k, v = (x.float().repeat_interleave(group, dim=2) for x in (k, v))
    weights = torch.einsum("thd,tlhd->thl", q.float(), k).div(q.shape[-1] ** 0.5).softmax(dim=-1)
    return torch.einsum("thl,tlhd->thd", weights, v)


class FakeWrapper:
    """FlashInfer's, as far as it is used."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        assert (workspace.dtype, kv_layout, use_tensor_cores) == (torch.uint8, "HND", True)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert (num_qo_heads, num_kv_heads, head_dim, page_size) == (4, 1, 128, 64)
        self.tables = [indices[a:b].long() for a, b in itertools.pairwise(indptr.tolist())]
        self.last = last_page_len

    def run(
        self, q: torch.Tensor, pages: tuple[torch.Tensor, ...], k_scale: float = 1.0, v_scale: float = 1.0
    ) -> torch.Tensor:
        rows = []
        for row, (table, last) in enumerate(zip(self.tables, self.last.tolist(), strict=True)):
            k, v = (
                kept[table].float().transpose(1, 2).flatten(0, 1)[None, : (len(table) - 1) * 64 + last]
                for kept in pages
            )
            rows.append(attend(q[row : row + 1], k * k_scale, v * v_scale))
        return torch.cat(rows)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
) -> torch.Tensor:
    """FlashAttention 3's, as far as it is used: q [T, 1, H, D], pages [P, 64, K, D]."""
    length = int(cache_seqlens[0])
    k, v = (kept[page_table.long()].flatten(1, 2)[:, :length] for kept in (k_cache, v_cache))
    return attend(q[:, 0], k, v)[:, None].to(q.dtype)


def cutlass_scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """vLLM's: a [M, K], b [K, N] with columns in one piece, scales of rows and of columns."""
    assert b.stride(0) == 1
    assert (scale_a.numel(), scale_b.numel()) == (a.shape[0], b.shape[1])
    return ((a.float() @ b.float()) * scale_a.view(-1, 1) * scale_b.view(1, -1)).to(out_dtype)


@needs_emulator
@pytest.mark.parametrize("options", [{}, {"fp8": True, "output": 1}])
def test_peers_get_what_they_ask_for(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Those that are not installed here, by stand-ins with their signatures and layouts."""
    from kernels.bench import inputs_on
    from tests.bench.gpu.kernel_timings import real_output

    modules: dict[str, dict[str, Any]] = {
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": FakeWrapper},
        "vllm": {},
        "vllm._custom_ops": {"cutlass_scaled_mm": cutlass_scaled_mm},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    device = EmulatedDevice(PLAIN[0])
    (attention,), (linear,) = select_ops("decode_attention"), select_ops("skinny_gemm")
    case = next(case for case in attention.cases if case.name == "all of one length")
    case = type(case)(case.name, case.sizes, {**case.options, **options})
    inputs = inputs_on(attention, case, device)
    attention.launch(device, **inputs)
    usable, missing = usable_peers(decode_attention_peers(inputs), inputs, real_output(inputs))
    suffix = ", BF16 KV" if options else ""
    assert usable.keys() == {f"SDPA{suffix}", f"FlashAttention 3, paged{suffix}", "FlashInfer, paged"}, missing
    assert missing == {f"FlexAttention{suffix}": "RuntimeError: is compiled for GPUs alone"}
    inputs = inputs_on(linear, linear.cases[7], device)
    linear.launch(device, **inputs)
    usable, missing = usable_peers(linear_peers(inputs), inputs, real_output(inputs))
    assert usable.keys() == {"cuBLASLt rowwise", "cuBLASLt tensorwise", "vLLM CUTLASS"}, missing
    usable, missing = usable_peers(linear_peers(inputs), inputs, 2 * real_output(inputs))
    assert not usable
    assert set(missing.values()) == {"gives something else: relative error 0.500"}


def attend_causally(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [n, H, D], the last tokens of keys and values [length, K, D]."""
    before = len(k) - len(q)
    rows = [attend(q[i : i + 1], k[None, : before + i + 1], v[None, : before + i + 1]) for i in range(len(q))]
    return torch.cat(rows)


class FakePrefillWrapper:
    """FlashInfer's, as far as it is used."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert (workspace.dtype, kv_layout) == (torch.uint8, "HND")

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert (num_qo_heads, num_kv_heads, head_dim_qk, page_size, causal) == (4, 2, 128, 64, True)
        assert q_data_type == kv_data_type == torch.bfloat16
        self.rows = [slice(a, b) for a, b in itertools.pairwise(qo_indptr.tolist())]
        self.tables = [paged_kv_indices[a:b].long() for a, b in itertools.pairwise(paged_kv_indptr.tolist())]
        self.last = paged_kv_last_page_len.tolist()

    def run(self, q: torch.Tensor, pages: tuple[torch.Tensor, ...]) -> torch.Tensor:
        results = []
        for rows, table, last in zip(self.rows, self.tables, self.last, strict=True):
            k, v = (kept[table].transpose(1, 2).flatten(0, 1)[: (len(table) - 1) * 64 + last] for kept in pages)
            results.append(attend_causally(q[rows], k, v))
        return torch.cat(results)


def causal_flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    causal: bool,
) -> torch.Tensor:
    """FlashAttention 3's, as far as it is used: q [chunks, n, H, D], pages [P, 64, K, D]."""
    assert causal
    length = int(cache_seqlens[0])
    k, v = (kept[page_table.long()].flatten(1, 2)[:, :length] for kept in (k_cache, v_cache))
    return torch.stack([attend_causally(*of_chunk) for of_chunk in zip(q, k, v, strict=True)])


@needs_emulator
@pytest.mark.parametrize(
    "options",
    [{"chunks": ((0, 40), (0, 40))}, {"chunks": ((60, 10), (60, 10), (60, 10)), "fp8": True, "output": 1}],
    ids=["whole", "behind others, fp8"],
)
def test_peers_attend_to_chunks(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    from kernels.bench import inputs_on
    from kernels.op import Case
    from tests.bench.gpu.kernel_timings import real_output

    for name, member in (
        ("flash_attn_interface", {"flash_attn_with_kvcache": causal_flash_attn_with_kvcache}),
        ("flashinfer", {"BatchPrefillWithPagedKVCacheWrapper": FakePrefillWrapper}),
    ):
        module = ModuleType(name)
        module.__dict__.update(member)
        monkeypatch.setitem(sys.modules, name, module)
    device = EmulatedDevice(PLAIN[0])
    (attention,) = select_ops("prefill_attention")
    inputs = inputs_on(attention, Case("alike", {"H": 4, "K": 2}, options), device)
    attention.launch(device, **inputs)
    usable, missing = usable_peers(prefill_attention_peers(inputs), inputs, real_output(inputs))
    suffix = ", BF16 KV" if "fp8" in options else ""
    assert usable.keys() == {f"{name}{suffix}" for name in ("SDPA", "FlashAttention 3, paged", "FlashInfer, paged")}, (
        missing
    )
    assert missing == {f"FlexAttention{suffix}": "RuntimeError: is compiled for GPUs alone"}


def test_chunks_of_two_kinds_have_no_peers() -> None:
    (attention,) = select_ops("prefill_attention")
    case = next(case for case in attention.cases if case.name == "chunks of every kind")
    inputs = attention.make_inputs(case, 0)
    usable, missing = usable_peers(prefill_attention_peers(inputs), inputs, inputs["out"])
    assert not usable
    assert missing["SDPA"] == "ValueError: the chunks are of 5 kinds, expected one"
