"""The container's environment becomes settings and options, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.container import environment
from backend.container.environment import VARIABLES, read_environment
from backend.errors import ConfigError
from backend.serve import parse_arguments
from backend.settings import Settings

ALL = {
    "NIM_MODEL_PATH": "/models/x",
    "NIM_SERVED_MODEL_NAME": "nemo",
    "NIM_MAX_MODEL_LEN": "32768",
    "NIM_LOG_LEVEL": "WARNING",
    "NIM_JSONL_LOGGING": "1",
    "NIM_ENABLE_KV_CACHE_REUSE": "0",
    "NIM_SERVER_PORT": "9100",
    "HTTP_PORT": "8100",
    "GRPC_PORT": "8101",
    "METRICS_PORT": "8102",
    "GRACE_S": "90",
}


def test_everything_arrives_where_it_is_read() -> None:
    read = read_environment(ALL)
    assert read.checkpoint == Path("/models/x")
    settings = Settings.load({}, read.variables | {"NEMO_CHECKPOINT": "/models/x"})
    assert (settings.max_model_len, settings.log_level, settings.log_format) == (32768, "warning", "json")
    assert settings.prefix_cache is False
    arguments = parse_arguments(read.options)
    assert (arguments.openai_port, arguments.http_port, arguments.grpc_port) == (9100, 8100, 8101)
    assert (arguments.metrics_port, arguments.grace_s, arguments.model_name) == (8102, 90.0, "nemo")
    assert read.variables["GATEWAY_LOG_LEVEL"] == "warning"


def test_every_option_exists() -> None:
    texts = {"--model-name": "x", "--grpc-tls-cert": "/c", "--grpc-tls-key": "/k", "--grpc-tls-client-ca": "/a"}
    for variable in VARIABLES:
        for target in variable.becomes:
            if target.startswith("--"):
                parse_arguments([target, texts.get(target, "1")])


def test_models_of_a_hub_lie_in_the_store() -> None:
    read = read_environment({"NIM_MODEL_PATH": "hf://a/b@v1", "NIM_CACHE_PATH": "/store"})
    assert read.checkpoint == Path("/store/a--b@v1")
    assert read_environment({}).checkpoint is None
    assert read_environment({"NEMO_CHECKPOINT": "/x"}).checkpoint == Path("/x")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NIM_TENSOR_PARALLEL_SIZE": "2"}, "NIM_TENSOR_PARALLEL_SIZE: is not understood; .*NIM_MAX_MODEL_LEN"),
        ({"NIM_LOG_LEVEL": "LOUD"}, "NIM_LOG_LEVEL: must be one of DEFAULT, .*, got 'LOUD'"),
        ({"NIM_JSONL_LOGGING": "yes please"}, "NIM_JSONL_LOGGING: must be 0 or 1, got 'yes please'"),
        ({"NIM_MAX_MODEL_LEN": "1", "NEMO_MAX_MODEL_LEN": "2"}, "NIM_MAX_MODEL_LEN=1 contradicts NEMO_MAX_MODEL_LEN=2"),
        ({"NIM_SERVER_PORT": "1", "OPENAI_PORT": "2"}, "OPENAI_PORT=2 contradicts NIM_SERVER_PORT=1"),
        ({"NIM_MODEL_PATH": "hf://a"}, "must be hf://ORGANISATION/NAME"),
        ({"NIM_MODEL_PATH": "/a", "NEMO_CHECKPOINT": "/b"}, "NIM_MODEL_PATH and NEMO_CHECKPOINT: give one"),
        ({"REQUIRE_GPU": "maybe"}, "REQUIRE_GPU: must be 0 or 1"),
    ],
)
def test_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_environment(variables)


def test_service_links_of_kubernetes_are_no_settings() -> None:
    read_environment(
        {"NIM_LLM_SERVICE_HOST": "10.0.0.1", "NIM_LLM_PORT_8000_TCP": "tcp://10.0.0.1:8000", "NIM_LLM_PORT": "t"}
    )


def test_said_twice_alike_is_no_contradiction() -> None:
    assert read_environment({"NIM_SERVER_PORT": "9000", "OPENAI_PORT": "9000"}).options == ("--openai-port", "9000")


def test_table_in_the_readme_is_the_one_from_here() -> None:
    assert environment.environment_table() in Path(environment.__file__).with_name("README.md").read_text()
