"""The peer `PyTorch, static batch`: what one would write with torch alone, with the same weights in FP8.

Linear layers by torch._scaled_mm with a scale a row and a token, attention by scaled_dot_product_attention over BF16 KV of a
fixed length, layers through torch.compile, a whole decode step as one CUDA graph, an id drawn at temperature 1 in each. A batch
has its prompts computed one after the other, then all its answers, which have the same length; no request joins in between.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from backend.checkpoint.matrix import Matrix
from backend.checkpoint.model_config import ModelConfig
from backend.checkpoint.weights import LayerWeights
from backend.runner.rope import RopeTable, rotate
from tests.bench.gpu.models import random_weights
from tests.bench.serving.load import NO_TIME
from tests.bench.serving.scale import Scale
from tests.bench.serving.scenarios import Scenario

_E4M3_MAX = 448.0
_NUM_PROMPTS = 3
_NUM_STEPS = 20
Layer = Callable[..., torch.Tensor]


class StaticModel:
    """Random weights of a model, and its two ways through the layers."""

    def __init__(self, config: ModelConfig, device: torch.device, max_tokens: int) -> None:
        self.config = config
        self.device = device
        self._weights = random_weights(config, device)
        self._rope = RopeTable(config.head_dim, config.rope_theta, max_tokens, device)
        # One compilation serves all layers of a shape. On a CPU it would take longer than what is measured.
        self._layer: Layer = torch.compile(self._run_layer) if device.type == "cuda" else self._run_layer

    def prompt(self, ids: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Run prompts `ids` [B, T] from their beginning, write KV [L, 2, B, K, >= T, D], and draw the next ids [B, 1]."""
        positions = torch.arange(ids.shape[1], device=self.device)
        return self._run(ids, kv[:, :, :, :, : ids.shape[1]], positions, is_causal=True)

    def step(self, ids: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run one token each, `ids` [B, 1] at `positions` [1], the last of KV [L, 2, B, K, length, D]; the next ids [B, 1]."""
        return self._run(ids, kv, positions, is_causal=False)

    def _run(self, ids: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
        x = functional.embedding(ids, self._weights.embedding)
        cos, sin = self._rope.at(positions)
        for number, layer in enumerate(self._weights.layers):
            x = self._layer(layer, x, kv[number, 0], kv[number, 1], cos, sin, positions, is_causal)
        logits = _linear(_norm(x[:, -1:], self._weights.norm, self.config.rms_norm_eps), self._weights.head).float()
        # The largest of p / Exp(1) is a sample of p.
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)

    def _run_layer(
        self,
        layer: LayerWeights,
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        is_causal: bool,
    ) -> torch.Tensor:
        """x [B, T, E] through attention and feed-forward; keys and values [B, K, length, D] get those of `positions` [T]."""
        config, (batch, num_tokens, _) = self.config, x.shape
        heads = _linear(_norm(x, layer.attention_norm, config.rms_norm_eps), layer.qkv)
        heads = heads.view(batch, num_tokens, -1, config.head_dim)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=2)
        q, k = (rotate(part.float(), cos, sin).to(x.dtype).transpose(1, 2) for part in (q, k))
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v.transpose(1, 2))
        seen = functional.scaled_dot_product_attention(q, keys, values, is_causal=is_causal, enable_gqa=True)
        x = x + _linear(seen.transpose(1, 2).flatten(2), layer.output)
        gate, up = _linear(_norm(x, layer.ffn_norm, config.rms_norm_eps), layer.gate_up).chunk(2, dim=-1)
        return x + _linear(functional.silu(gate) * up, layer.down)


def measure_static_batch(
    scale: Scale, device: torch.device, time_is_left: Callable[[], bool], say: Callable[[dict[str, Any]], None]
) -> None:
    """A cell for each scenario; out of memory for one is its reason to be skipped."""
    longest = max(scenario.prompt_tokens + scenario.output_tokens for scenario in scale.scenarios)
    with torch.inference_mode():
        model = StaticModel(scale.config, device, longest)
        for scenario in scale.scenarios:
            if not time_is_left():
                say(scenario.describe() | {"skipped": NO_TIME})
                continue
            try:
                say(scenario.describe() | {"capacity": _measure(model, scenario)})
            except torch.cuda.OutOfMemoryError as error:
                say(scenario.describe() | {"skipped": f"out of memory: {str(error).partition('.')[0]}"})


def _measure(model: StaticModel, scenario: Scenario) -> dict[str, Any]:
    """Tokens a second of a batch from its first prompt to its last ids, by the times of a prompt and of a step.

    A step is timed at the mean context: its time grows linearly with that. The median request waits for (B + 1) / 2 prompts,
    those before its own and that.
    """
    config, batch, context = model.config, scenario.num_concurrent, scenario.prompt_tokens + scenario.output_tokens // 2
    shape = (config.num_layers, 2, batch, config.num_kv_heads, context, config.head_dim)
    kv = torch.zeros(shape, dtype=torch.bfloat16, device=model.device)
    kv.normal_()
    prompt = torch.randint(1256, config.vocab_size, (1, scenario.prompt_tokens), device=model.device)
    prompt_s = statistics.median(
        _seconds(lambda: model.prompt(prompt, kv[:, :, :1]), model.device) for _ in range(1 + _NUM_PROMPTS)
    )
    ids = torch.randint(1256, config.vocab_size, (batch, 1), device=model.device)
    positions = torch.tensor([context - 1], device=model.device)
    replay = _graph(lambda: ids.copy_(model.step(ids, kv, positions)), model.device)
    step_s = statistics.median(_seconds(replay, model.device) for _ in range(_NUM_STEPS))
    tokens_per_s = batch * scenario.output_tokens / (batch * prompt_s + scenario.output_tokens * step_s)
    return {
        "in_flight": batch,
        "tokens_per_s": round(tokens_per_s, 1),
        "requests_per_s": round(tokens_per_s / scenario.output_tokens, 4),
        "first_token_p50_ms": round(1000 * prompt_s * (batch + 1) / 2, 3),
        "inter_token_p50_ms": round(1000 * step_s, 3),
    }


def _graph(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as a CUDA graph, after it has been compiled; itself where there is no GPU."""
    run()
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def _linear(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """y = x W^T; with FP8 weights x [..., inputs] is quantised with a scale a token."""
    if matrix.scales is None:
        return functional.linear(x, matrix.values)
    rows = x.flatten(0, -2)
    scales = rows.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / _E4M3_MAX
    y = torch._scaled_mm(
        (rows.float() / scales).to(torch.float8_e4m3fn),
        matrix.values.t(),
        scale_a=scales,
        scale_b=matrix.scales[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y.view(*x.shape[:-1], -1)
