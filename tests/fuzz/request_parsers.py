"""Everything that reads what a client or an operator sends, as functions of bytes, each with right inputs to damage."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from backend.checkpoint.vocabulary import read_vocabulary
from backend.container.environment import read_environment
from backend.engine.guide import GuideCompiler
from backend.errors import ConfigError, RequestError
from backend.settings import Settings, read_model_parameters
from client.gateway.settings import GatewaySettings
from tests.checkpoints import write_tekken
from tests.fuzz.parser import Parser
from tests.triton.live_server import PROJECT
from tests.triton.mixed_requests import GUIDES, mixed_request
from tests.triton_stub import Request, Tensor, request_of, triton_stub

MAX_MODEL_LEN = 4096
NUM_RANKS = 3000
_WALK_STEPS = 12
REPOSITORY = PROJECT / "model_repository"

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "a thing", "name": "look"},
    {"role": "assistant", "content": "A thing."},
    {"role": "user", "content": "Grüße"},
]
_PARAMETERS = {"type": "object", "properties": {"at": {"type": "string", "pattern": "^[a-z]+$"}}, "required": ["at"]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": _PARAMETERS}}]
WHOLE = {
    "text_input": "Hello",
    "max_tokens": 12,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "seed": 3,
    "random_seed": 3,
    "stop_words": ["a", "b"],
    "bad_words": ["c"],
    "stop_token_ids": [5, 6],
    "end_id": 2,
    "ignore_eos": False,
    "logit_bias_ids": [7],
    "logit_bias_values": [1.5],
    "embedding_bias_words": ["d"],
    "embedding_bias_weights": [1.0],
    "num_return_sequences": 2,
    "num_logprobs": 2,
    "prompt_logprobs": 1,
    "exclude_input_in_output": True,
    "stream": True,
    "priority": 1,
    "deadline_ms": 1000,
    "cache_salt": "x",
    "beam_width": 1,
    "length_penalty": 1.0,
    "min_length": 1,
    "early_stopping": False,
    "return_context_logits": False,
    "return_generation_logits": False,
    "stop": False,
}
CHUNK = [2, 5, 6, 0, 0, 1, 2, 1, 0, 1, 9, 1100, 1101, 1100]
PLACES = json.dumps(
    [
        {
            "id": 5,
            "bytes": [],
            "log_prob": -1.0,
            "rank": 1,
            "top": [{"id": 6, "bytes": [], "log_prob": -1.0, "rank": 1}],
        },
        None,
    ]
)
_SETTINGS = {
    "checkpoint": "/models",
    "runner": "torch",
    "weight_dtype": "fp8",
    "max_model_len": "1024",
    "max_num_seqs": "8",
    "gpu_memory_fraction": "0.5",
    "kv_cache_tokens": "0",
    "kv_swap_ratio": "1.5",
    "prefix_cache": "true",
    "log_level": "info",
}
_CONTAINER = {
    "NIM_MODEL_PATH": "hf://a/b@main",
    "NIM_MAX_MODEL_LEN": "1024",
    "NIM_LOG_LEVEL": "INFO",
    "NIM_JSONL_LOGGING": "1",
    "NIM_SERVER_PORT": "9000",
    "GRACE_S": "5",
    "NEMO_MAX_NUM_SEQS": "8",
    "GATEWAY_PORT": "9000",
    "REQUIRE_GPU": "0",
}
_GATEWAY = {
    "GATEWAY_PORT": "9000",
    "GATEWAY_TRITON": "localhost:8001",
    "GATEWAY_MODEL_NAME": "a,b",
    "GATEWAY_GRACE_S": "5",
    "GATEWAY_MAX_BODY_BYTES": "2048",
    "GATEWAY_LOG_LEVEL": "info",
    "GATEWAY_LOG_PROMPTS": "false",
    "PATH": "/bin",
}


@contextmanager
def request_parsers(folder: Path) -> Iterator[dict[str, Parser]]:
    """By what is parsed, on a vocabulary written into `folder`."""
    write_tekken(folder / "tekken.json", NUM_RANKS + 1000)
    vocabulary = read_vocabulary(folder)
    guides = GuideCompiler(vocabulary)
    guides.compile("regex", "a")  # starts the process that tries guides, so that its pipes are there from now on
    adapter = _Adapter(folder, vocabulary.vocab_size)
    mixed = (mixed_request(0, index) for index in range(20))
    whole = [WHOLE, *(each for each in mixed if max(each.get("prompt_token_ids", [0])) < vocabulary.vocab_size)]
    engine = [{name: value for name, value in each.items() if name not in ("text_input", "messages")} for each in whole]
    engine = [each | {"prompt_token_ids": [1, 1500], "bad_words": []} for each in engine]
    chats = [{"messages": json.dumps(MESSAGES), "tools": json.dumps(TOOLS), "max_tokens": 5}]
    chunks = [{"token_ids": [5, 6, 1100]}, {"stream_chunk": CHUNK, "finish_reason": "stop", "top_log_probs": PLACES}]
    try:
        yield {
            "messages": Parser((_json(MESSAGES),), lambda content: adapter.chat(content, None)),
            "tools": Parser((_json(TOOLS),), lambda content: adapter.chat(_json(MESSAGES), content)),
            "ensemble": Parser(tuple(map(_json, whole + chats)), adapter.ensemble),
            "mistral_nemo": Parser(tuple(map(_json, engine)), adapter.engine),
            "postprocessing": Parser(tuple(map(_json, chunks)), adapter.postprocessing),
            **{f"guide {kind}": _guide_parser(guides, kind, text) for kind, text in GUIDES},
            "settings": Parser((_json(_SETTINGS),), _settings),
            "config.pbtxt": _model_configuration_parser(folder / "config.pbtxt"),
            "container": Parser((_json(_CONTAINER),), lambda content: read_environment(_texts(content))),
            "gateway settings": Parser((_json(_GATEWAY),), _gateway_settings),
        }
    finally:
        adapter.close()
        guides.close()


class _Adapter:
    """The models before and behind the engine, and the decoding of the engine's own requests, in this process."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(triton_stub())
        from backend.triton_adapter import generation_inputs, postprocessing, preprocessing, tensors

        self._stack.enter_context(patch.dict("os.environ", {"NEMO_CHECKPOINT": str(folder)}))
        for module in (preprocessing, postprocessing):
            for name in ("start_logging", "announce"):
                self._stack.enter_context(patch.object(module, name, lambda *_: None))
        self._tensors, self._generation_request = tensors, generation_inputs.generation_request
        self._preprocessing = preprocessing.Preprocessing(REPOSITORY)
        self._postprocessing = postprocessing.Postprocessing(REPOSITORY)

    def close(self) -> None:
        """Forget the adapter's modules."""
        self._stack.close()

    def chat(self, messages: bytes, tools: bytes | None) -> None:
        """A chat as raw bytes of its two inputs."""
        given = {"messages": messages} | ({} if tools is None else {"tools": tools})
        tensors = [Tensor(name, np.array([[value]], dtype=np.object_)) for name, value in given.items()]
        self._answered(Request("ensemble", tensors, {}))

    def ensemble(self, content: bytes) -> None:
        """A request to the ensemble: preprocessing, then the engine's model with what came of it."""
        request = request_of("ensemble", _loads(content))
        made = self._answered(request)
        passed_on = {tensor.name(): tensor for tensor in request.inputs()} | made.tensors
        inputs = self._tensors.Inputs(Request("mistral_nemo", list(passed_on.values()), {}))
        if not inputs.number("stop"):
            self._generation(inputs)

    def engine(self, content: bytes) -> None:
        """A request to `mistral_nemo` by a token-level client."""
        self._generation(self._tensors.Inputs(request_of("mistral_nemo", _loads(content))))

    def postprocessing(self, content: bytes) -> None:
        """A request to `postprocessing`, which a client may call for the text of ids."""
        request = request_of("postprocessing", _loads(content))
        self._postprocessing.execute([request])
        _check(request.answers)

    def _answered(self, request: Request) -> Any:
        responses = self._preprocessing.execute([request])
        _check(responses)
        return responses[0]

    def _generation(self, inputs: Any) -> None:
        generation = self._generation_request(inputs, "", default_max_tokens=16, max_model_len=MAX_MODEL_LEN)
        generation.validate(self._vocab_size, MAX_MODEL_LEN)


def _check(responses: Any) -> None:
    """Raise what a model answered: RequestError for the caller's mistake, AssertionError for any other."""
    (response,) = responses
    if response.error is not None:
        assert response.error.code == "INVALID_ARG", f"{response.error.code}: {response.error.message}"
        field, _, problem = response.error.message.partition(": ")
        raise RequestError(field, problem)


def _guide_parser(guides: GuideCompiler, kind: str, text: str) -> Parser:
    """Compile, then follow the guide for some steps: it is not proven before that it has an end."""

    def parse(content: bytes) -> None:
        matcher = guides.compile(kind, content.decode("utf-8", "replace")).start()
        for _ in range(_WALK_STEPS):
            if matcher.is_complete:
                break
            mask = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
            matcher.accept(int(mask.argmax()))

    return Parser((text.encode(),), parse, "json" if kind in ("json_schema", "choice") else "text")


def _settings(content: bytes) -> None:
    """As parameters and as environment: what one takes, the other does."""
    texts = _texts(content)
    made = Settings.load(texts, {})
    assert made == Settings.load({}, {f"NEMO_{name.upper()}": text for name, text in texts.items()})


def _gateway_settings(content: bytes) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            GatewaySettings.load([], _texts(content))
        except SystemExit as end:
            assert end.code == 2  # noqa: PT017 (its status is the point)
            raise ConfigError(said.getvalue().splitlines()[-1]) from None


def _model_configuration_parser(path: Path) -> Parser:
    def parse(content: bytes) -> None:
        path.write_bytes(content)
        parameters = read_model_parameters(path)
        Settings.load({"checkpoint": "/models"} | parameters, {})

    return Parser(((REPOSITORY / "mistral_nemo" / "config.pbtxt").read_bytes(),), parse, "text")


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _loads(content: bytes) -> Any:
    """The client's JSON, when the server can parse it."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError("json", "cannot be parsed") from None


def _texts(content: bytes) -> dict[str, str]:
    """Names and texts, as an environment or a configuration file can hold them."""
    values = _loads(content)
    if not isinstance(values, dict):
        raise RequestError("json", "must be an object")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {name.replace("\0", ""): text.replace("\0", "") for name, text in texts.items()}
