"""Every setting of the server: one frozen dataclass, read once at start-up.

Defaults are overridden by `parameters` of mistral_nemo/config.pbtxt, and those by environment variables `NEMO_<NAME>`.
`python -m backend.settings` writes the table in the project's README from here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, one_line, shown

ENVIRONMENT_PREFIX = "NEMO_"
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
_OTHER_VARIABLES = {"NEMO_RUN_DIR", "NEMO_KERNEL_CACHE"}
"""Variables with our prefix that are no settings: the folder where supervisor and models leave their process ids, and the
one where compiled kernels are kept (`kernels/cubin_cache.py`)."""

TABLE_BEGIN = "<!-- settings: begin (written by python -m backend.settings) -->"
TABLE_END = "<!-- settings: end -->"


def _setting(
    default: Any, help_text: str, *, choices: tuple[str, ...] = (), low: float = 0, high: float = 2**31
) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator chose. `checkpoint` must be given; everything else has a default."""

    checkpoint: str = _setting("", "checkpoint folder (Hugging Face or Mistral layout); must be given")
    runner: str = _setting(
        "auto",
        "what executes the steps: `torch` is PyTorch on CPU or GPU; `cuda` are our own kernels for Hopper, not yet run on "
        "hardware, so `auto` takes torch; `fake` computes nothing (benchmarks of the host)",
        choices=("auto", "torch", "cuda", "fake"),
    )
    weight_dtype: str = _setting(
        "auto",
        "weights of the linear layers; `auto`: fp8 if the checkpoint's are, else fp32 on the CPU and bf16 on a GPU; "
        "`fp8` quantises others while loading",
        choices=("auto", "fp32", "bf16", "fp8"),
    )
    head_dtype: str = _setting(
        "auto",
        "output head; `auto`: fp8 if the checkpoint's is, else as the embedding, which is never fp8",
        choices=("auto", "fp32", "bf16", "fp8"),
    )
    kv_dtype: str = _setting(
        "auto",
        "KV pages; `auto`: fp8 if the checkpoint has scales for them, else as the embedding",
        choices=("auto", "fp32", "bf16", "fp8"),
    )
    max_model_len: int = _setting(
        131072, "most tokens of prompt and output together; lowered at start-up to what the KV pages hold", low=16
    )
    max_num_seqs: int = _setting(256, "most sequences that run at once", low=1, high=4096)
    max_step_tokens: int = _setting(
        512, "most tokens in one step; prompts longer than what is left are cut into chunks", low=16, high=65536
    )
    gpu_memory_fraction: float = _setting(
        0.9, "share of the GPU's memory for weights, KV and workspace", low=0.05, high=1
    )
    kv_cache_tokens: int = _setting(
        0,
        "tokens the KV pages hold, rounded down to pages of 64; 0: from the memory there is, at most 65,536 on the CPU",
    )
    kv_swap_ratio: float = _setting(
        1.0,
        "host pages per device page, for sequences that must give way; 0: none ever does, each waits until all its pages fit",
        high=16,
    )
    prefix_cache: bool = _setting(
        True, "share KV pages of equal prompt beginnings between requests of equal `cache_salt`"
    )
    default_max_tokens: int = _setting(
        256, "`max_tokens` of a request that names none, lowered to what is left of max_model_len", low=1
    )
    max_queued_requests: int = _setting(1024, "requests that may wait; one more is refused with UNAVAILABLE", low=1)
    max_queued_tokens: int = _setting(
        0, "prompt tokens that may wait; a request beyond is refused with UNAVAILABLE; 0: no bound"
    )
    default_deadline_ms: int = _setting(600_000, "`deadline_ms` of a request that names none; 0: none")
    num_threads: int = _setting(
        0, "threads of the PyTorch runner on the CPU; 0: one a physical core, less one for the server", high=1024
    )
    max_tokens_per_response: int = _setting(
        0,
        "tokens that one response of a stream carries at most, for clients that count responses; 0: all that have come since the "
        "last, which is many times faster under load",
    )
    max_unsent_tokens: int = _setting(
        64,
        "tokens by which a stream may be ahead of what its client was sent; there it pauses until they are sent; 0: no bound",
    )
    recording: str = _setting(
        "",
        "folder in which each engine process writes down what it was asked and what it planned, for "
        "`python -m backend.engine.recording`; the files hold prompts and outputs; empty: none",
    )
    recording_max_mb: int = _setting(1000, "size at which a recording ends, while serving goes on; 0: no bound")
    log_format: str = _setting("text", "lines of text, or one JSON object a line", choices=("text", "json"))
    log_level: str = _setting("info", "least severe lines in the log", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for name, value, metadata in ((f.name, getattr(self, f.name), f.metadata) for f in fields(self)):
            if metadata["choices"] and value not in metadata["choices"]:
                raise ConfigError(
                    f"setting {name}: must be one of {', '.join(metadata['choices'])}, got {shown(value)}"
                )
            if not isinstance(value, str | bool) and not metadata["low"] <= value <= metadata["high"]:
                raise ConfigError(
                    f"setting {name}: must be in [{metadata['low']}, {metadata['high']}], got {shown(value)}"
                )
        if self.max_num_seqs > self.max_step_tokens:
            raise ConfigError(
                f"setting max_num_seqs: must be at most max_step_tokens = {self.max_step_tokens}, got {self.max_num_seqs}"
            )

    @classmethod
    def load(cls, parameters: Mapping[str, str], environment: Mapping[str, str] | None = None) -> Settings:
        """Settings from a model config's string parameters, overridden by `NEMO_*` of `environment` (default: the process's).

        Raises ConfigError for a key that does not exist (and lists those that do), a wrong type, or a value out of range.
        """
        environment = os.environ if environment is None else environment
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        given = [(name, text, "parameter") for name, text in parameters.items()] + [
            (name[len(ENVIRONMENT_PREFIX) :].lower(), text, f"environment variable {name}")
            for name, text in environment.items()
            if name.startswith(ENVIRONMENT_PREFIX) and name not in _OTHER_VARIABLES
        ]
        for name, text, source in given:
            if name not in known:
                raise ConfigError(f"unknown setting {shown(name)} ({source}); there are: {', '.join(known)}")
            values[name] = _parse(name, text, type(known[name].default))
        settings = cls(**values)
        if not settings.checkpoint:
            raise ConfigError("setting checkpoint: must name a checkpoint folder, got none (set NEMO_CHECKPOINT)")
        return settings


def _parse(name: str, text: str, kind: type) -> Any:
    text = text.strip()
    if kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ConfigError(f"setting {name}: must be true or false, got {shown(text)}")
    try:
        return kind(text)
    except ValueError:
        words = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"setting {name}: must be {words}, got {shown(text)}") from None


def read_model_parameters(config_path: Path) -> dict[str, str]:
    """The string parameters of a config.pbtxt (how preprocessing and postprocessing learn the engine's settings)."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse(config_path.read_text(), model_config_pb2.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigError(f"{config_path}: cannot be read as a model configuration: {one_line(str(error))}") from error
    return {name: parameter.string_value for name, parameter in config.parameters.items()}


def settings_table() -> str:
    """The settings as a Markdown table."""
    lines = ["| setting | default | bounds | meaning |", "|---|---|---|---|"]
    for f in fields(Settings):
        bounds = "true, false" if isinstance(f.default, bool) else ", ".join(f.metadata["choices"])
        if not isinstance(f.default, str | bool):
            bounds = f"{f.metadata['low']:,} to {f.metadata['high']:,}"
        default = str(f.default).lower()
        if isinstance(f.default, int) and not isinstance(f.default, bool):
            default = f"{f.default:,}"
        lines.append(f"| `{f.name}` | {default} | {bounds} | {f.metadata['help']} |")
    return "\n".join(lines)


def write_settings_table(readme: Path) -> None:
    """Put the table between its markers in a README."""
    text = readme.read_text()
    before, begin, rest = text.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    assert begin, f"{readme} lacks the markers of the settings table"
    assert end, f"{readme} lacks the end marker of the settings table"
    readme.write_text(f"{before}{begin}\n\n{settings_table()}\n\n{end}{after}")


if __name__ == "__main__":
    write_settings_table(Path(__file__).resolve().parents[1] / "README.md")
