"""What share of the GPU's limits each number is. Without a GPU there is no such limit, and nothing is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.checkpoint.model_config import ModelConfig
from tests.bench.gpu.floor import decode_bytes, prompt_us, serving_us
from tests.bench.gpu.models import FP8
from tests.bench.serving.scenarios import Scenario

_KV_BYTES = 1


@dataclass(frozen=True)
class Roofline:
    """Of a model with FP8 weights and FP8 KV on a GPU that reads `bytes_per_us`, and multiplies at the datasheet's rates."""

    config: ModelConfig
    bytes_per_us: float

    def shares(self, scenario: Scenario, numbers: dict[str, Any], *, is_capacity: bool) -> dict[str, float]:
        """To be added to `numbers` of a window; shares of 1 are the limit.

        share: tokens a second, of the most that so many requests in flight can get (serving_us); at capacity only.
        first_token_share: the median, of a prompt that is alone. inter_token_share: the median, of a step that reads the weights
        and the KV of the requests in flight.
        """
        prompt, output, in_flight = scenario.prompt_tokens, scenario.output_tokens, numbers["in_flight"]
        weights = decode_bytes(self.config, FP8, _KV_BYTES, 1, 0)
        row = decode_bytes(self.config, FP8, _KV_BYTES, 1, prompt + output // 2) - weights
        floors_ms = {
            "first_token": prompt_us(self.config, prompt, self.bytes_per_us) / 1000,
            "inter_token": (weights + in_flight * row) / self.bytes_per_us / 1000,
        }
        shares: dict[str, float] = {}
        for name, floor_ms in floors_ms.items():
            if median_ms := numbers[f"{name}_p50_ms"]:
                shares |= {f"{name}_floor_ms": floor_ms, f"{name}_share": floor_ms / median_ms}
        if is_capacity and in_flight:
            best_us = serving_us(
                self.config,
                FP8,
                _KV_BYTES,
                prompt=prompt,
                output=output,
                batch=in_flight,
                bytes_per_us=self.bytes_per_us,
            )
            most = in_flight * output / (best_us / 1e6)
            shares |= {"most_tokens_per_s": most, "share": numbers["tokens_per_s"] / most}
        return {name: round(value, 4) for name, value in shares.items()}
