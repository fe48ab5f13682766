"""What needs no server: settings, keys, log-probabilities, guides, the README's tables."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

import pytest

from client.gateway import VERSION
from client.gateway.guides import tool_call_guide
from client.gateway.keys import ApiKeys
from client.gateway.log_probs import CompletionLogProbs, chat_entries
from client.gateway.settings import GatewaySettings
from client.gateway.tables import README, with_tables

KEY = "sk-0123456789abcdef"
EURO = list("€".encode())
PLACES = [
    {
        "id": 5,
        "log_prob": -0.5,
        "rank": 1,
        "bytes": [72],
        "top": [{"id": 5, "log_prob": -0.5, "rank": 1, "bytes": [72]}],
    },
    {
        "id": 7,
        "log_prob": -3.0,
        "rank": 3,
        "bytes": EURO[:2],
        "top": [
            {"id": 6, "log_prob": -0.1, "rank": 1, "bytes": EURO[:1]},
            {"id": 8, "log_prob": -0.2, "rank": 2, "bytes": [72]},
        ],
    },
    {"id": 9, "log_prob": -0.7, "rank": 1, "bytes": EURO[2:], "top": []},
    {"id": 5, "log_prob": -0.9, "rank": 1, "bytes": [72], "top": []},
]


def test_tables_of_the_readme_are_those_of_the_code() -> None:
    text = README.read_text()
    assert with_tables(text) == text, "run `python -m client.gateway.tables`"


def test_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_command_line_goes_before_environment_before_defaults() -> None:
    settings = GatewaySettings.load(["--port", "1234"], {"GATEWAY_PORT": "99", "GATEWAY_LOG_PROMPTS": "true"})
    assert (settings.port, settings.log_prompts, settings.grace_s) == (1234, True, 30.0)
    assert GatewaySettings.load([], {"GATEWAY_MODEL_NAME": "a, b"}).model_names == ("a", "b")


@pytest.mark.parametrize(
    ("argv", "environment", "said"),
    [
        ([], {"GATEWAY_PROT": "1"}, "GATEWAY_PROT: no such setting; there are: GATEWAY_HOST"),
        ([], {"GATEWAY_PORT": "x"}, "GATEWAY_PORT: must be a whole number, got 'x'"),
        (["--port", "70000"], {}, "port: must be in [1, 65535], got 70000"),
        (["--triton", "here"], {}, "triton: must be host:port, got 'here'"),
        (["--tls-cert", "/dev/null"], {}, "tls_cert and tls_key: must be given both"),
        (["--api-keys-file", "/nowhere"], {}, "api_keys_file: no file at '/nowhere'"),
        (["--model-name", " , "], {}, "model_name: must have at least one name"),
        (["--log-level", "loud"], {}, "log_level: must be one of debug"),
    ],
)
def test_settings_that_cannot_be_meant(
    argv: list[str], environment: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        GatewaySettings.load(argv, environment)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_keys_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    hashed = hashlib.sha256(b"from the hash").hexdigest()
    file.write_text(f"# ours\n{KEY}\n\nsha256:{hashed}\n")
    keys = ApiKeys.load(str(file), {"GATEWAY_API_KEYS": "sk-another-long-key, sk-and-one-more-key"})
    for good in (KEY, "from the hash", "sk-another-long-key", "sk-and-one-more-key"):
        assert keys.allow(f"Bearer {good}")
        assert keys.allow(f"bearer {good}")
    for bad in (None, "", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer sha256:{hashed}", "Bearer", "Bearer # ours"):
        assert not keys.allow(bad)
    assert KEY not in repr(vars(keys))


def test_keys_that_are_none(tmp_path: Path) -> None:
    assert not ApiKeys.load("", {}).are_needed
    with pytest.raises(ValueError, match="at least 16 characters") as refused:
        ApiKeys.load("", {"GATEWAY_API_KEYS": "short"})
    assert "short" not in str(refused.value)
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(ValueError, match="has no key"):
        ApiKeys.load(str(tmp_path / "empty"), {})


def test_log_probabilities_of_a_chat() -> None:
    first, second, *_ = chat_entries(PLACES, 1)
    assert first == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}],
    }
    assert (second["token"], second["bytes"]) == ("\ufffd", EURO[:2])
    assert [other["logprob"] for other in second["top_logprobs"]] == [-0.1]
    assert all(entry["top_logprobs"] == [] for entry in chat_entries(PLACES, 0))


def test_log_probabilities_of_a_completion() -> None:
    log_probs = CompletionLogProbs(1)
    first, second = log_probs.add([None, *PLACES[:1]], "<a>"), log_probs.add(PLACES[1:])
    assert first["tokens"] == ["<a>", "H"]
    assert first["token_logprobs"] == [None, -0.5]
    assert first["top_logprobs"] == [None, {"H": -0.5}]
    assert second["tokens"] == ["bytes:\\xe2\\x82", "bytes:\\xac", "H"]
    # The token that was chosen is always among the alternatives, and the likeliest are kept.
    assert second["top_logprobs"][0] == {"bytes:\\xe2": -0.1, "bytes:\\xe2\\x82": -3.0}
    assert first["text_offset"] + second["text_offset"] == [0, 3, 4, 4, 5]


def test_schemas_of_tools_keep_their_references() -> None:
    inner = {"$ref": "#/$defs/City"}
    parameters = {"type": "object", "properties": {"city": inner}, "$defs": {"City": {"enum": ["Paris"]}}}
    schema = json.loads(tool_call_guide([("a", None), ("b", parameters)], is_parallel=False).text)
    moved = schema["$defs"]["tool1"]
    assert moved["properties"]["city"] == {"$ref": "#/$defs/tool1/$defs/City"}
    assert moved["$defs"]["City"] == {"enum": ["Paris"]}
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert "maxItems" not in json.loads(tool_call_guide([("a", None)], is_parallel=True).text)
