"""Settings of the gateway: command line, then environment (`GATEWAY_*`), then defaults."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

_PREFIX = "GATEWAY_"
KEYS_VARIABLE = f"{_PREFIX}API_KEYS"
_SHOWN_CHARACTERS = 200
_LOG_LEVELS = ("debug", "info", "warning", "error")


def _setting(default: Any, text: str) -> Any:
    return dataclass_field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GatewaySettings:
    """Everything that can be set; ValueError names the setting, the bound and the value."""

    host: str = _setting("0.0.0.0", "address to listen on")
    port: int = _setting(9000, "port to listen on")
    triton: str = _setting("localhost:8001", "host:port of Triton's gRPC")
    triton_metrics: str = _setting("localhost:8002", "host:port of Triton's metrics")
    model_name: str = _setting(
        "mistral-nemo", "name the model is served under; several, separated by commas, are aliases"
    )
    max_body_bytes: int = _setting(16 * 2**20, "largest request body; a larger one is refused with 413")
    max_messages: int = _setting(2048, "most messages of a chat")
    max_prompts: int = _setting(256, "most prompts of one completions request")
    api_keys_file: str = _setting(
        "", f"file of keys, one a line, as they are or as `sha256:<hex>`; more in {KEYS_VARIABLE}"
    )
    tls_cert: str = _setting("", "certificate chain in PEM; with tls_key the gateway speaks HTTPS only")
    tls_key: str = _setting("", "private key of tls_cert in PEM")
    grace_s: float = _setting(30.0, "seconds a drain waits for running answers")
    log_level: str = _setting("info", "least severe lines in the log: debug, info, warning, error")
    log_prompts: bool = _setting(False, "write prompts into the log, in full")

    def __post_init__(self) -> None:
        bounds = {"port": (1, 65535), "max_body_bytes": (1024, 2**31 - 1), "max_messages": (1, 2**20)}
        bounds |= {"max_prompts": (1, 4096), "grace_s": (0, 86400)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: must be in [{low}, {high}], got {value}")
        for name in ("triton", "triton_metrics"):
            if not re.fullmatch(r"[^\s/]+:\d+", getattr(self, name)):
                raise ValueError(f"{name}: must be host:port, got {_shown(getattr(self, name))}")
        if not self.model_names:
            raise ValueError("model_name: must have at least one name, got none")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key: must be given both or not at all")
        for name in ("tls_cert", "tls_key", "api_keys_file"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ValueError(f"{name}: no file at {_shown(path)}")
        if self.log_level not in _LOG_LEVELS:
            raise ValueError(f"log_level: must be one of {', '.join(_LOG_LEVELS)}, got {_shown(self.log_level)}")

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names the model answers to; the first one stands in responses."""
        return tuple(name.strip() for name in self.model_name.split(",") if name.strip())

    @classmethod
    def load(cls, argv: Sequence[str] | None, environment: Mapping[str, str] | None = None) -> GatewaySettings:
        """From the command line and the environment; ends the process with code 2 and one line for what cannot be meant."""
        environment = os.environ if environment is None else environment
        parser = argparse.ArgumentParser(
            prog="python -m client.gateway",
            description="OpenAI's HTTP API in front of the ensemble.",
            allow_abbrev=False,
        )
        known = {each.name: each for each in fields(cls)}
        for name, each in known.items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(each.default, bool):
                parser.add_argument(flag, action="store_true", default=None, help=each.metadata["help"])
            else:
                parser.add_argument(flag, type=type(each.default), default=None, help=each.metadata["help"])
        values = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
        try:
            for variable, text in environment.items():
                name = variable.removeprefix(_PREFIX).lower()
                if not variable.startswith(_PREFIX) or variable == KEYS_VARIABLE:
                    continue
                if name not in known:
                    listed = ", ".join(f"{_PREFIX}{each.upper()}" for each in known)
                    shown = variable if variable.isprintable() else repr(variable)
                    raise ValueError(
                        f"{shown[:_SHOWN_CHARACTERS]}: no such setting; there are: {listed}, {KEYS_VARIABLE}"
                    )
                values.setdefault(name, _parsed(variable, text, type(known[name].default)))
            return cls(**values)
        except ValueError as error:
            parser.error(str(error))


def settings_table() -> str:
    """The settings as a Markdown table."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for each in fields(GatewaySettings):
        default = f"{each.default:,}" if isinstance(each.default, int) and each.default > 65535 else str(each.default)
        lines.append(f"| `{each.name}` | {default.lower()} | {each.metadata['help']} |")
    return "\n".join(lines)


def _parsed(variable: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{variable}: must be true or false, got {_shown(text)}")
        return text.lower() in ("true", "1")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(
            f"{variable}: must be {'a whole number' if kind is int else 'a number'}, got {_shown(text)}"
        ) from None


def _shown(text: str) -> str:
    """A value as it is quoted in a refusal."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")
