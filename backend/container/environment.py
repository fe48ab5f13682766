"""The container's environment: NIM's names and our own -> `NEMO_*` and `GATEWAY_*` variables, and options of the supervisor.

`python -m backend.container.environment` writes the table in the README beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from backend.errors import ConfigError, shown

STORE = Path("/models")
HUB_PREFIX = "hf://"
_HUB_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SERVICE_LINK = re.compile(r"NIM_.*(_SERVICE_(HOST|PORT)(_.*)?|_PORT_\d+_(TCP|UDP)(_.*)?|_PORT)")
_LEVELS = {
    "DEFAULT": "info", "TRACE": "debug", "DEBUG": "debug", "INFO": "info",
    "WARNING": "warning", "ERROR": "error", "CRITICAL": "error",
}  # fmt: skip
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def _text(name: str, text: str) -> str:
    return text


def _level(name: str, text: str) -> str:
    if text.upper() not in _LEVELS:
        raise ConfigError(f"{name}: must be one of {', '.join(_LEVELS)}, got {shown(text)}")
    return _LEVELS[text.upper()]


def _flag(name: str, text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ConfigError(f"{name}: must be 0 or 1, got {shown(text)}")
    return _FLAGS[text.lower()]


def _json_log(name: str, text: str) -> str:
    return "json" if _flag(name, text) else "text"


def _true_false(name: str, text: str) -> str:
    return str(_flag(name, text)).lower()


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable: what it becomes (`NEMO_*`, `GATEWAY_*` variables or `--options`), and how its text is read."""

    name: str
    becomes: tuple[str, ...]
    meaning: str
    read: Callable[[str, str], str] = _text


VARIABLES = (
    Variable("NIM_SERVED_MODEL_NAME", ("--model-name",), "the model's name at the OpenAI gateway; several by commas"),
    Variable("NIM_MAX_MODEL_LEN", ("NEMO_MAX_MODEL_LEN",), "most tokens of prompt and output together"),
    Variable("NIM_LOG_LEVEL", ("NEMO_LOG_LEVEL", "GATEWAY_LOG_LEVEL"), "DEBUG, INFO, WARNING, ERROR", _level),
    Variable("NIM_JSONL_LOGGING", ("NEMO_LOG_FORMAT",), "1: one JSON object a line", _json_log),
    Variable("NIM_ENABLE_KV_CACHE_REUSE", ("NEMO_PREFIX_CACHE",), "1 or 0: the prefix cache", _true_false),
    Variable("NIM_SERVER_PORT", ("--openai-port",), "port of the OpenAI gateway; 0: none"),
    Variable("NIM_SSL_CERTS_PATH", ("GATEWAY_TLS_CERT",), "PEM file: the gateway speaks HTTPS with this certificate"),
    Variable("NIM_SSL_KEY_PATH", ("GATEWAY_TLS_KEY",), "PEM file: its private key"),
    Variable("OPENAI_PORT", ("--openai-port",), "the same as NIM_SERVER_PORT"),
    Variable("HTTP_PORT", ("--http-port",), "Triton's HTTP port"),
    Variable("GRPC_PORT", ("--grpc-port",), "Triton's gRPC port"),
    Variable("METRICS_PORT", ("--metrics-port",), "the metrics port"),
    Variable("GRACE_S", ("--grace-s",), "seconds a drain waits for running requests"),
    Variable("GRPC_TLS_CERT", ("--grpc-tls-cert",), "PEM file: the gRPC port speaks TLS with this certificate"),
    Variable("GRPC_TLS_KEY", ("--grpc-tls-key",), "PEM file: its private key"),
    Variable("GRPC_TLS_CLIENT_CA", ("--grpc-tls-client-ca",), "PEM file: clients need a certificate of this CA"),
)
_READ_HERE = {
    "NIM_MODEL_PATH": "a folder, or `hf://ORGANISATION/NAME[@REVISION]` in the model store; none: the demo checkpoint",
    "NIM_CACHE_PATH": f"the model store, by default `{STORE}`",
    "REQUIRE_GPU": "1: refuse to start without a GPU",
    "HF_TOKEN": "for gated models at the hub; read by huggingface_hub alone",
    "HF_HUB_OFFLINE": "1: nothing is fetched",
}


@dataclass(frozen=True, slots=True)
class ContainerEnvironment:
    """What the environment asks for: variables to set, options of the supervisor, where the checkpoint is."""

    variables: dict[str, str]
    options: tuple[str, ...]
    source: str
    store: Path
    requires_gpu: bool

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder; None for the demo checkpoint."""
        if not self.source:
            return None
        return store_folder(self.source, self.store) if self.source.startswith(HUB_PREFIX) else Path(self.source)


def read_environment(environment: Mapping[str, str]) -> ContainerEnvironment:
    """Translate the environment; ConfigError for what is not understood or said twice with different values."""
    known = {variable.name for variable in VARIABLES} | set(_READ_HERE)
    for name in environment:
        if name.startswith("NIM_") and name not in known and not _SERVICE_LINK.fullmatch(name):
            raise ConfigError(f"{name}: is not understood; of NIM's variables there are: {', '.join(_nim_names())}")
    given: dict[str, tuple[str, str]] = {}
    for variable in VARIABLES:
        text = environment.get(variable.name, "")
        if not text:
            continue
        value = variable.read(variable.name, text)
        for target in variable.becomes:
            own = environment.get(target, "")
            before, said_by = (own, target) if own else given.get(target, (value, ""))
            if before != value:
                raise ConfigError(f"{variable.name}={text} contradicts {said_by}={before}: give one of them")
            given[target] = (value, variable.name)
    source = environment.get("NIM_MODEL_PATH", "")
    if source and environment.get("NEMO_CHECKPOINT", source) != source:
        raise ConfigError("NIM_MODEL_PATH and NEMO_CHECKPOINT: give one of them")
    if source.startswith(HUB_PREFIX):
        hub_name(source)
    return ContainerEnvironment(
        variables={target: value for target, (value, _) in given.items() if not target.startswith("--")},
        options=tuple(
            part for target, (value, _) in given.items() if target.startswith("--") for part in (target, value)
        ),
        source=source or environment.get("NEMO_CHECKPOINT", ""),
        store=Path(environment.get("NIM_CACHE_PATH") or STORE),
        requires_gpu=_flag("REQUIRE_GPU", environment.get("REQUIRE_GPU") or "0"),
    )


def hub_name(source: str) -> tuple[str, str | None]:
    """Repository and revision of an address at the hub.

    >>> hub_name("hf://mistralai/Mistral-Nemo-Instruct-2407@main")
    ('mistralai/Mistral-Nemo-Instruct-2407', 'main')
    """
    found = _HUB_NAME.fullmatch(source)
    if found is None:
        raise ConfigError(f"model: must be hf://ORGANISATION/NAME[@REVISION], got {shown(source)}")
    return found[1], found[2]


def store_folder(source: str, store: Path) -> Path:
    """Where a model of the hub lies in the store.

    >>> store_folder("hf://mistralai/Mistral-Nemo-Instruct-2407@main", Path("/models"))
    PosixPath('/models/mistralai--Mistral-Nemo-Instruct-2407@main')
    """
    repository, revision = hub_name(source)
    return store / (repository.replace("/", "--") + (f"@{revision.replace('/', '--')}" if revision else ""))


def _nim_names() -> list[str]:
    return sorted(name for name in ({v.name for v in VARIABLES} | set(_READ_HERE)) if name.startswith("NIM_"))


def environment_table() -> str:
    """The variables as a Markdown table."""
    rows = [(name, "", meaning) for name, meaning in _READ_HERE.items()]
    rows += [(v.name, ", ".join(f"`{target}`" for target in v.becomes), v.meaning) for v in VARIABLES]
    lines = ["| variable | becomes | meaning |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {becomes} | {meaning} |" for name, becomes, meaning in rows])


def write_table(readme: Path) -> None:
    """Put the table between its markers."""
    before, begin, rest = readme.read_text().partition("<!-- environment: begin")
    mark, _, rest = rest.partition("-->")
    _, end, after = rest.partition("<!-- environment: end -->")
    readme.write_text(f"{before}{begin}{mark}-->\n\n{environment_table()}\n\n{end}{after}")


if __name__ == "__main__":
    write_table(Path(__file__).with_name("README.md"))
