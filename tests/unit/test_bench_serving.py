"""`make bench-serving` without a GPU: the whole command at toy scale, and its peers and shares with stand-ins."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import ModelConfig, read_model_config
from backend.checkpoint.vocabulary import read_vocabulary
from backend.checkpoint.weight_loader import load_weights
from backend.plan import NEMO_12B as NEMO
from tests.bench.conditions import RESULTS
from tests.bench.gpu.floor import decode_bytes, prompt_us, serving_us
from tests.bench.gpu.models import FP8, TOY
from tests.bench.serving import __main__ as command
from tests.bench.serving import bench as bench_module
from tests.bench.serving import static_batch as static_module
from tests.bench.serving import vllm_way as vllm_module
from tests.bench.serving.bench import ENSEMBLE, ON_EMULATOR, OURS, Bench
from tests.bench.serving.checkpoint import write_checkpoint, write_made_up_tekken
from tests.bench.serving.load import NO_TIME, measure
from tests.bench.serving.peer_process import measure_peer
from tests.bench.serving.peers import run_peer
from tests.bench.serving.roofline import Roofline
from tests.bench.serving.scale import SMALL
from tests.bench.serving.scenarios import SCENARIOS, Scenario
from tests.bench.serving.static_batch import StaticModel, measure_static_batch
from tests.bench.serving.triton_way import prepare_wheel
from tests.bench.serving.way import ServingError
from tests.bench.serving_tables import capacity_table
from tests.emulator.marks import needs_emulator

STATIC = "PyTorch, static batch"
CPU = torch.device("cpu")


def run(*arguments: str) -> int:
    return command.main(arguments)


def test_the_engine_at_toy_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One scenario of our engine in its process, and a peer in its own."""
    file = tmp_path / "toy.json"
    ways = ("--ways", OURS, STATIC)
    assert run("engine", "--toy", "--scenarios", "1000/1000", "--window-s", "0.3", "--json", str(file), *ways) == 0
    lines = capsys.readouterr().out.splitlines()
    assert command.TOY in lines[0]
    assert command.TOY in lines[-1]
    results = json.loads(file.read_text())
    assert results["scale"] == "toy"
    assert results["date"]
    ours, static = results["cells"]
    assert (ours["way"], ours["prompt_tokens"], ours["output_tokens"], ours["concurrent"]) == (OURS, 25, 25, 4)
    assert ours["prefix_hit_tokens"] == 0
    assert ours["capacity"]["tokens_per_s"] > 0
    assert ours["capacity"]["in_flight"] == pytest.approx(4, abs=0.01)
    assert [numbers["load"] for numbers in ours["poisson"]] == [0.95, 0.8, 0.5]
    assert "share" not in ours["capacity"], "a CPU has no roofline"
    assert static["way"] == STATIC
    assert static["capacity"]["inter_token_p50_ms"] > 0
    assert results["missing"] == {}


@needs_emulator
def test_the_cuda_runner_on_the_emulator(tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    assert run("engine", "--toy", "--json", str(file), "--ways", ON_EMULATOR) == 0
    results = json.loads(file.read_text())
    (cell,) = results["cells"]
    assert (cell["prompt_tokens"], cell["output_tokens"], cell["concurrent"]) == (5, 5, 2)
    assert cell["capacity"]["output_tokens"] >= 2
    assert capacity_table(results).endswith(" | -" * 7 + " |"), "too few tokens for latencies"


def test_toy_scale_writes_nothing_where_a_gpu_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("engine", "--toy", "--json", str(RESULTS / "serving_engine.json")) == 2
    assert "this is toy scale" in capsys.readouterr().err


def make_bench(file: Path | None = None, seconds: float = 60.0, roofline: Roofline | None = None) -> Bench:
    scale = replace(SMALL, scenarios=SMALL.scenarios[:2], window_s=0.2, settle_s=0.0)
    return Bench(scale, {}, seconds=seconds, json_file=file, roofline=roofline)


def test_when_the_time_is_over_nothing_new_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = SimpleNamespace(num_prefix_hit_tokens=0, close=lambda: None)
    monkeypatch.setattr(bench_module, "engine_in_its_process", lambda _: way)
    bench = make_bench(tmp_path / "results.json", seconds=0.0)
    bench.engine(tmp_path, tmp_path, (OURS, STATIC))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["skipped"] for cell in results["cells"]] == [NO_TIME] * 2
    assert results["missing"] == {STATIC: NO_TIME}


def test_without_an_emulator_it_is_missing_and_nothing_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "why_not_emulated", lambda: "no g++")
    bench = make_bench()
    bench.engine(tmp_path, tmp_path, (ON_EMULATOR,))
    assert bench.results["missing"] == {ON_EMULATOR: "no g++"}
    assert not bench.has_failed


def test_a_way_that_fails_is_in_the_results_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> Any:
        raise ServingError("no kernel image")

    news = {"scenario": "1000/1000", "concurrent": 4, "skipped": NO_TIME}
    monkeypatch.setattr(bench_module, "engine_in_its_process", fail)
    monkeypatch.setattr(bench_module, "run_peer", lambda *_: iter([news, {"missing": "ended"}]))
    bench = make_bench()
    bench.engine(tmp_path, tmp_path, (OURS, "transformers"))
    assert bench.has_failed
    assert bench.results["missing"] == {OURS: "ServingError: no kernel image", "transformers": "ended"}
    assert bench.results["cells"] == [{"way": "transformers"} | news]


def test_a_peer_that_dies_or_takes_too_long_is_missing(tmp_path: Path) -> None:
    job: dict[str, Any] = {"scale": "toy", "checkpoint": str(tmp_path), "seconds": 30, "scenarios": [], "window_s": 0.1}
    (news,) = run_peer("nobody", job, tmp_path, 60.0)
    assert news["missing"].startswith("KeyError")
    started_s = time.monotonic()
    (news,) = run_peer(STATIC, job, tmp_path, 0.2)
    assert "ended with status -15 (after 0 s it is ended)" in news["missing"]
    assert time.monotonic() - started_s < 60


class FakeEngine:
    """vLLM's LLMEngine, as far as it is used: every request gets a token a step."""

    def __init__(self) -> None:
        self.requests: dict[str, tuple[dict[str, list[int]], Any]] = {}
        self.made: Counter[str] = Counter()

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert params.ignore_eos
        assert not params.detokenize
        assert (params.temperature, params.output_kind) == (1.0, "delta")
        self.requests[request_id] = prompt, params

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self.requests[request_id]

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        time.sleep(0.001)
        outputs = []
        for request_id, (_, params) in tuple(self.requests.items()):
            self.made[request_id] += 1
            finished = self.made[request_id] == params.max_tokens
            outputs.append(
                SimpleNamespace(request_id=request_id, outputs=[SimpleNamespace(token_ids=[5])], finished=finished)
            )
            if finished:
                del self.requests[request_id]
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """vLLM's modules; what LLM was called with."""
    given: dict[str, Any] = {}

    def make_llm(**options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(llm_engine=FakeEngine())

    kinds = SimpleNamespace(DELTA="delta")
    for name, members in (
        ("vllm", {"LLM": make_llm, "SamplingParams": SimpleNamespace}),
        ("vllm.sampling_params", {"RequestOutputKind": kinds}),
    ):
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return given


def test_vllm_gets_the_load_that_we_get(fake_vllm: dict[str, Any], tmp_path: Path) -> None:
    way = vllm_module.vllm_way(tmp_path / "checkpoint", SMALL, torch.device("cuda"))
    assert fake_vllm["load_format"] == "dummy"
    assert (fake_vllm["quantization"], fake_vllm["kv_cache_dtype"]) == ("fp8", "fp8")
    sizes = [fake_vllm[name] for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len")]
    assert sizes == [int(SMALL.settings[name]) for name in ("max_num_seqs", "max_step_tokens", "max_model_len")]
    config = json.loads((Path(fake_vllm["model"]) / "config.json").read_text())
    assert (config["hidden_size"], config.get("quantization_config")) == (TOY.hidden_size, None)
    cells: list[dict[str, Any]] = []
    scale = replace(SMALL, window_s=0.2, settle_s=0.05)
    measure(
        way, Scenario("1000/1000", 20, 20, 4), itertools.count(1), scale, shares=(0.5,), time_is_left=lambda: True,
        keep=cells.append,
    )  # fmt: skip
    assert cells[-1]["capacity"]["requests_ended"] > 1
    assert cells[-1]["poisson"][0]["load"] == 0.5
    assert not way._engine.requests, "everything is taken back at the end"


def test_vllm_that_does_not_get_idle_is_an_error(
    fake_vllm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_module, "_IDLE_TIMEOUT_S", 0.0)
    way = vllm_module.vllm_way(tmp_path / "checkpoint", SMALL, torch.device("cuda"))
    way.wait_until_idle()
    way.submit(1, (5, 6), 1_000_000)
    with pytest.raises(ServingError, match="vLLM is not idle after 0 s"):
        way.wait_until_idle()


def test_what_runs_on_a_gpu_runs_with_stand_ins(
    fake_vllm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device, its read bandwidth and our engine are stand-ins; vLLM's, which is one too, gives the tokens."""
    way: Any = vllm_module.vllm_way(tmp_path / "vllm" / "checkpoint", SMALL, torch.device("cuda"))
    way.num_prefix_hit_tokens = 0
    devices: list[torch.device] = []

    def write(folder: Path, config: ModelConfig, device: torch.device) -> Path:
        devices.append(device)
        return folder

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(command, "CudaDevice", object)
    monkeypatch.setattr(command, "read_ceiling", lambda _: 4.3e6)
    monkeypatch.setattr(command, "write_checkpoint", write)
    monkeypatch.setattr(command, "FULL", replace(SMALL, name="full", window_s=0.2, settle_s=0.05))
    monkeypatch.setattr(bench_module, "engine_in_its_process", lambda _: way)
    file = tmp_path / "gpu.json"
    assert run("engine", "--json", str(file), "--ways", OURS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bench-serving: a stand-in"
    assert lines[-1] == f"bench-serving: results in {file}"
    assert devices == [torch.device("cuda")]
    results = json.loads(file.read_text())
    assert (results["scale"], results["gpu"], results["read_ceiling_tb_per_s"]) == ("full", "a stand-in", 4.3)
    assert [cell["scenario"] for cell in results["cells"]] == [scenario.name for scenario in SCENARIOS]
    assert all(cell["capacity"]["share"] > 0 for cell in results["cells"])
    assert all(numbers["inter_token_share"] > 0 for cell in results["cells"] for numbers in cell["poisson"][:1])
    assert capacity_table(results).count("%") == 8


def test_vllm_is_compared_on_gpus_alone(tmp_path: Path) -> None:
    assert said_by("vLLM", tmp_path / "checkpoint") == [{"missing": "RuntimeError: is compared on GPUs alone"}]


def said_by(name: str, checkpoint: Path, **changes: Any) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    job = {"scale": "toy", "checkpoint": str(checkpoint), "scenarios": ["2048/128"], "window_s": 0.2, "seconds": 60}
    measure_peer(name, job | changes, said.append)
    return said


def test_transformers_gets_the_load_that_we_get(tmp_path: Path) -> None:
    (cell,) = said_by("transformers", tmp_path / "checkpoint")
    assert cell["scenario"] == "2048/128"
    assert cell["capacity"]["requests_ended"] > 0
    assert said_by("transformers", tmp_path / "checkpoint", seconds=0)[0]["skipped"] == NO_TIME


def test_the_static_batch_computes_what_a_whole_prompt_gives() -> None:
    """Steps behind a prompt draw from the logits that the longer prompt has; layers take part in one compilation."""
    with torch.inference_mode():
        model = StaticModel(TOY, CPU, 64)
        ids = torch.randint(0, TOY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
        kv = torch.zeros(TOY.num_layers, 2, 2, TOY.num_kv_heads, 9, TOY.head_dim, dtype=torch.bfloat16)
        whole, split = kv.clone(), kv.clone()
        model.prompt(ids, whole)
        model.prompt(ids[:, :8], split)
        assert not split[:, :, :, :, 8].any()
        model.step(ids[:, 8:], split, torch.tensor([8]))
        error = (split - whole).float().norm() / whole.float().norm()
        assert error < 0.02
        assert model.prompt(ids, kv).shape == (2, 1)


def test_the_median_request_of_a_static_batch_waits_for_the_prompts_before_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts and steps of 10 ms each: 50 for four prompts and an id, of which the requests wait for 10, 20, 30 and 40."""
    monkeypatch.setattr(static_module, "_seconds", lambda *_: 0.01)
    cells: list[dict[str, Any]] = []
    scale = replace(SMALL, scenarios=(Scenario("", 8, 1, 4),))
    measure_static_batch(scale, CPU, lambda: True, cells.append)
    assert cells[0]["capacity"]["first_token_p50_ms"] == pytest.approx(25)
    assert cells[0]["capacity"]["inter_token_p50_ms"] == pytest.approx(10)
    assert cells[0]["capacity"]["tokens_per_s"] == pytest.approx(4 / 0.05)


def test_layers_of_the_static_batch_share_a_compilation() -> None:
    compilations = []

    def backend(module: Any, _: object) -> Callable[..., Any]:
        compilations.append(module)
        forward: Callable[..., Any] = module.forward
        return forward

    with torch.inference_mode():
        model = StaticModel(replace(TOY, num_layers=4), CPU, 64)
        model._layer = torch.compile(model._run_layer, backend=backend)
        model.prompt(torch.zeros(1, 8, dtype=torch.long), torch.zeros(4, 2, 1, 1, 8, 128, dtype=torch.bfloat16))
    assert len(compilations) == 1


def test_a_checkpoint_is_served_as_it_is_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", SMALL.config, CPU)
    config = read_model_config(folder)
    weights = load_weights(folder, config, device=CPU, weight_format=WeightFormat(torch.bfloat16, has_fp8_linears=True))
    assert len(read_vocabulary(folder).token_bytes) == SMALL.config.vocab_size
    down = weights.layers[1].down
    assert down.scales is not None
    real = down.values.float() * down.scales[:, None]
    assert float(real.std()) == pytest.approx(config.ffn_size**-0.5, rel=0.1)
    assert float((down.values.float() == 0).float().mean()) < 0.01
    assert weights.head.values.dtype == torch.bfloat16
    made_up = tmp_path / "made-up"
    made_up.mkdir()
    write_made_up_tekken(made_up / "tekken.json", NEMO.vocab_size)
    assert len(set(read_vocabulary(made_up).token_bytes)) == NEMO.vocab_size - 1000 + 1


def test_shares_of_the_roofline_by_hand() -> None:
    """1000/1000, 256 at a time, at 4.3 TB/s: 12.25 GB of weights and 256 x 1,500 tokens of KV a step."""
    step_bytes = decode_bytes(NEMO, FP8, 1, 256, 1500)
    assert step_bytes == 40 * 272_629_760 + 2 * 131072 * 5120 + 256 * 1500 * 81_920
    us = serving_us(NEMO, FP8, 1, prompt=1000, output=1000, batch=256, bytes_per_us=4.3e6)
    assert us == pytest.approx(1000 * step_bytes / 4.3e6)
    # Long prompts and short answers are bound by products: 2 FLOP a weight and token.
    us = serving_us(NEMO, FP8, 1, prompt=2048, output=128, batch=64, bytes_per_us=4.3e6)
    linears = 64 * 2176 * 2 * 40 * 272_629_760 / 1979e6
    assert us == pytest.approx(linears + 64 * 2 * 40 * 4096 * 2048 * 2049 / 989e6)
    numbers = {"in_flight": 256.0, "tokens_per_s": 13_500.0, "first_token_p50_ms": 100.0, "inter_token_p50_ms": 20.0}
    shares = Roofline(NEMO, 4.3e6).shares(SCENARIOS[0], numbers, is_capacity=True)
    assert shares["most_tokens_per_s"] == pytest.approx(256e6 / (step_bytes / 4.3e6), rel=1e-4)
    assert shares["share"] == pytest.approx(13_500 * step_bytes / 4.3e6 / 256e6, rel=1e-3)
    assert shares["inter_token_share"] == pytest.approx(step_bytes / 4.3e6 / 1000 / 20, rel=1e-3)
    assert shares["first_token_share"] == pytest.approx(prompt_us(NEMO, 1000, 4.3e6) / 1000 / 100, rel=1e-3)
    assert "share" not in Roofline(NEMO, 4.3e6).shares(SCENARIOS[0], numbers, is_capacity=False)


def test_results_of_a_gpu_have_their_shares() -> None:
    bench = make_bench(roofline=Roofline(NEMO, 4.3e6))
    numbers = {"in_flight": 4.0, "tokens_per_s": 100.0, "first_token_p50_ms": 9.0, "inter_token_p50_ms": 9.0}
    latency = {f"{name}_p99_ms": 9.0 for name in ("first_token", "inter_token")}
    cell = {"way": ENSEMBLE, "capacity": numbers | latency, "poisson": [{"load": 0.5, "skipped": NO_TIME}]}
    bench._keep(cell | SMALL.scenarios[0].describe())
    (kept,) = bench.results["cells"]
    assert kept["capacity"]["share"] > 0
    assert kept["poisson"] == [{"load": 0.5, "skipped": NO_TIME}]


def test_an_unpacked_wheel_is_made_executable(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="holds no nvidia-pytriton"):
        prepare_wheel(tmp_path)
    programs = [
        tmp_path / "pytriton/tritonserver/bin/tritonserver",
        tmp_path / "pytriton/tritonserver/python_backend_stubs/3.12/triton_python_backend_stub",
    ]
    for program in programs:
        program.parent.mkdir(parents=True)
        program.touch(0o644)
    prepare_wheel(tmp_path)
    assert all(program.stat().st_mode & 0o111 == 0o111 for program in programs)
