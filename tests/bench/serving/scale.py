"""The sizes at which everything is measured: Mistral NeMo 12B on a GPU, a toy without one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from backend.checkpoint.model_config import ModelConfig
from backend.plan import NEMO_12B as NEMO
from tests.bench.gpu.models import TOY
from tests.bench.serving.scenarios import LAST_ID, SCENARIOS, Scenario

SHARES = (0.5, 0.8, 0.95)
"""Of the measured capacity, at which requests arrive by themselves."""


@dataclass(frozen=True)
class Scale:
    """`settings` are the engine's; `window_s` counts, after `settle_s` when requests arrive by themselves.

    Without `has_latencies`, so few tokens come that their times are left out of the results.
    """

    name: str
    config: ModelConfig
    scenarios: tuple[Scenario, ...]
    settings: dict[str, str]
    window_s: float
    settle_s: float
    patience_s: float
    shares: tuple[float, ...] = field(default=SHARES)
    has_latencies: bool = True


# A deadline would end what waits at 95 %. Nothing is ever swapped out: what is admitted has its pages.
_SETTINGS = {"default_deadline_ms": "0", "kv_swap_ratio": "0", "max_queued_requests": "4096", "kv_dtype": "fp8"}

FULL = Scale(
    "full",
    NEMO,
    SCENARIOS,
    _SETTINGS | {"runner": "cuda", "max_num_seqs": "256", "max_step_tokens": "2048", "max_model_len": "32768"},
    window_s=8.0,
    settle_s=2.0,
    patience_s=60.0,
)
_TOY_DIVISOR, _TOY_CONCURRENT = 40, 4
SMALL = Scale(
    "toy",
    replace(TOY, vocab_size=LAST_ID + 1),
    tuple(scenario.smaller(_TOY_DIVISOR, _TOY_CONCURRENT) for scenario in SCENARIOS),
    _SETTINGS
    | {"runner": "torch", "num_threads": "1", "max_num_seqs": "16", "max_step_tokens": "128", "max_model_len": "2048"}
    | {"kv_cache_tokens": "32768"},
    window_s=2.0,
    settle_s=0.5,
    patience_s=60.0,
)
# On the emulator a step takes a good part of a second, and the first one waits until its kernels are compiled.
EMULATED = Scale(
    "toy",
    SMALL.config,
    (SCENARIOS[0].smaller(200, 2),),
    {"max_num_seqs": "2", "max_model_len": "128", "max_step_tokens": "16"},
    window_s=2.0,
    settle_s=0.0,
    patience_s=180.0,
    shares=(),
    has_latencies=False,
)
