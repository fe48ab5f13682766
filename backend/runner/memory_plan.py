"""What the model takes of a device's memory, worked out before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from backend.checkpoint.model_config import ModelConfig
from backend.engine.plan import PAGE_TOKENS
from backend.errors import ConfigError

_GIB = 2**30
_EXAMPLE_LENGTHS = (1024, 4096, 32768, 131072)
_FP32_BYTES = 4
_LOGITS_COPIES = 4
"""FP32 copies of the sampled rows' logits that sampling holds at once, at most."""
PIECE_ROWS = 128
"""Positions whose logits scoring holds at once: 64 MB at a vocabulary of 131,072. Prompts may be a thousand times longer."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of weights, workspace and KV pages within `budget_bytes` of `device`.

    `num_pages` is chosen by `plan_memory`; a page holds 64 tokens of all layers.
    """

    device: str
    budget_bytes: int
    weight_bytes: int
    workspace_bytes: int
    page_bytes: int
    num_pages: int

    @property
    def kv_tokens(self) -> int:
        """Tokens the pages hold."""
        return self.num_pages * PAGE_TOKENS

    def lines(self, num_host_pages: int | None = None) -> dict[str, str]:
        """The plan for people: name -> value."""
        kv_bytes = self.num_pages * self.page_bytes
        fits = [
            f"{self.kv_tokens // length} of {length:,}" for length in _EXAMPLE_LENGTHS if length <= self.kv_tokens
        ] or [f"1 of {self.kv_tokens:,}"]
        swap = {} if num_host_pages is None else {"kv_swap": _host(num_host_pages, self.page_bytes)}
        return swap | {
            "memory": (
                f"weights {_gib(self.weight_bytes)} + workspace {_gib(self.workspace_bytes)} + KV {_gib(kv_bytes)} "
                f"of {_gib(self.budget_bytes)} on {self.device}"
            ),
            "kv_cache": f"{self.num_pages:,} pages = {self.kv_tokens:,} tokens: {', '.join(fits)} tokens each",
        }


def page_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Bytes of one page: K and V of 64 tokens in all layers."""
    return 2 * config.num_layers * config.kv_size * PAGE_TOKENS * element_bytes


def workspace_bytes(config: ModelConfig, max_step_tokens: int, max_num_seqs: int) -> int:
    """Bytes of a step's intermediate results in FP32: widest rows of its tokens, logits that sampling and scoring hold."""
    widest_row = max(config.hidden_size + 2 * config.ffn_size, config.query_size + 2 * config.kv_size)
    num_logit_rows = _LOGITS_COPIES * max_num_seqs + PIECE_ROWS
    return _FP32_BYTES * (max_step_tokens * widest_row + num_logit_rows * config.vocab_size)


def plan_memory(
    device: str,
    budget_bytes: int,
    weight_bytes: int,
    workspace_bytes: int,
    page_bytes: int,
    *,
    kv_cache_tokens: int,
    most_tokens: int | None,
    gathered_page_bytes: int = 0,
    max_model_len: int = 0,
) -> MemoryPlan:
    """Choose the number of pages: `kv_cache_tokens` if given, else what is left, at most `most_tokens` if there is a bound.

    `gathered_page_bytes` are added to the workspace for each page of the longest sequence, which has `max_model_len` tokens
    or, if they hold less, all pages. ConfigError with all the numbers when the model does not fit with at least one page.
    """
    left = budget_bytes - weight_bytes - workspace_bytes
    num_gathered = min(-(-max_model_len // PAGE_TOKENS), max(0, left) // (page_bytes + gathered_page_bytes))
    workspace_bytes += num_gathered * gathered_page_bytes
    left -= num_gathered * gathered_page_bytes
    num_pages = max(0, left) // page_bytes
    if kv_cache_tokens:
        wanted = kv_cache_tokens // PAGE_TOKENS
        if wanted < 1:
            raise ConfigError(
                f"setting kv_cache_tokens: must be at least one page of {PAGE_TOKENS}, got {kv_cache_tokens}"
            )
        num_pages = wanted if wanted <= num_pages else 0
    elif most_tokens is not None:
        num_pages = min(num_pages, most_tokens // PAGE_TOKENS)
    if num_pages < 1:
        raise ConfigError(
            f"the model does not fit on {device}: weights {_gib(weight_bytes)} + workspace {_gib(workspace_bytes)} + KV "
            f"{_gib(max(kv_cache_tokens // PAGE_TOKENS, 1) * page_bytes)} are more than the {_gib(budget_bytes)} there are; "
            "choose a smaller weight_dtype or kv_cache_tokens, or a larger device"
        )
    return MemoryPlan(device, budget_bytes, weight_bytes, workspace_bytes, page_bytes, num_pages)


def _host(num_pages: int, page_bytes: int) -> str:
    return f"{num_pages:,} host pages ({_gib(num_pages * page_bytes)})"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
