"""`make test-perf-tools`: NVIDIA's load tools, unchanged, against a server with its gateway on the demo checkpoint.

python -m tests.gateway.perf_tools.run .venv-perf-tools
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.bench.conditions import conditions
from tests.gateway.conftest import MODEL, start
from tests.triton.live_server import LiveServer

NUM_REQUESTS = 20
NUM_TOKENS = 16
CONCURRENCY = 4
QUESTION = "What is Tekken?"
RESULT = Path(__file__).with_name("result.json")
_TIMEOUT_S = 300.0
Payload = dict[str, Any]

# What genai-perf gives perf_analyzer for each of its endpoint types (tests/triton/test_load_tools.py names the sources).
KSERVE: Payload = {"text_input": [QUESTION], "max_tokens": [NUM_TOKENS], "stream": [True], "min_length": [NUM_TOKENS]}
CHAT: Payload = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": NUM_TOKENS}
COMPLETION: Payload = {"model": MODEL, "prompt": [QUESTION], "max_tokens": NUM_TOKENS}
GENERATE: Payload = {"text_input": [QUESTION], "max_tokens": NUM_TOKENS}


class PerfAnalyzer:
    """The binary out of tritonclient's wheel, with the two libraries it wants from nvidia-pytriton."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self._binary = environment / "perf_analyzer"
        self._libraries = environment / "libraries"
        self._folder = folder

    def grpc(self, server: LiveServer) -> int:
        """Streams over gRPC; requests that came whole."""
        shapes = [part for name in KSERVE for part in ("--shape", f"{name}:1")]
        told = ["-m", "ensemble", "-i", "grpc", "--streaming", "-u", server.grpc_url, *shapes]
        return self._run("grpc", KSERVE, told)

    def openai(self, name: str, url: str, endpoint: str, payload: Payload) -> int:
        """Its client of OpenAI's API, which this version has without streams; requests that came whole."""
        told = ["-m", MODEL, "--service-kind", "openai", "--endpoint", endpoint, "-u", url]
        return self._run(name, {"payload": [payload]}, told)

    def _run(self, name: str, values: Payload, told: list[str]) -> int:
        data, export = self._folder / f"{name}.json", self._folder / f"{name}-export.json"
        data.write_text(json.dumps({"data": [values]}))
        load = ["--async", "--concurrency-range", str(CONCURRENCY), "--request-count", str(NUM_REQUESTS)]
        command = [str(self._binary), *told, "--input-data", str(data), *load, "--profile-export-file", str(export)]
        environment = os.environ | {"LD_LIBRARY_PATH": str(self._libraries)}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
        if said.returncode != 0:
            raise RuntimeError(
                f"perf_analyzer ended with {said.returncode}:\n{said.stdout[-2000:]}{said.stderr[-2000:]}"
            )
        requests = json.loads(export.read_text())["experiments"][0]["requests"]
        return sum(bool(request["response_timestamps"]) for request in requests)


class AiPerf:
    """aiperf out of its own environment, with a tokenizer of bytes: it only counts with it."""

    def __init__(self, environment: Path, folder: Path) -> None:
        self._binary = environment / "bin" / "aiperf"
        self._folder = folder
        write_tokenizer(folder / "tokenizer")

    def profile(self, url: str, kind: str, *, stream: bool) -> int:
        """A short load; requests that came whole, RuntimeError when one did not."""
        artifacts = self._folder / f"{kind}-{stream}"
        command = [
            *(self._binary, "profile", "--model", MODEL, "--url", url, "--endpoint-type", kind, "--ui", "none"),
            *("--request-count", NUM_REQUESTS, "--concurrency", CONCURRENCY, "--tokenizer", self._folder / "tokenizer"),
            *("--synthetic-input-tokens-mean", 64, "--output-tokens-mean", NUM_TOKENS, "--artifact-dir", artifacts),
            *("--extra-inputs", "ignore_eos:true", *(["--streaming"] if stream else [])),
        ]
        said = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=_TIMEOUT_S)
        found = list(artifacts.rglob("profile_export_aiperf.json"))
        if said.returncode != 0 or not found:
            raise RuntimeError(f"aiperf ended with {said.returncode}:\n{said.stdout[-3000:]}{said.stderr[-3000:]}")
        report = json.loads(found[0].read_text())
        if (report.get("error_request_count") or {}).get("avg", 0):
            raise RuntimeError(f"aiperf: {report['error_request_count']} {report.get('error_summary')}")
        return int(report["request_count"]["avg"])


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, as transformers reads it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={each: place for place, each in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def main(environment: Path) -> int:
    """Run every tool, write result.json; exit status 1 when a request of one did not come whole."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = start(folder / "server")
        try:
            result = run_all(server, PerfAnalyzer(environment, folder), AiPerf(environment, folder))
            server.stop()
        finally:
            server.kill_everything()
    told = conditions("tests.gateway.perf_tools.run", [str(environment)])
    RESULT.write_text(json.dumps({"conditions": told, "requests": result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if set(result.values()) == {NUM_REQUESTS} else 1


def run_all(server: LiveServer, analyzer: PerfAnalyzer, aiperf: AiPerf) -> dict[str, int]:
    """Requests that came whole, by tool and endpoint; -1 for a tool that failed, which is printed."""
    gateway, triton = f"http://127.0.0.1:{server.openai_port}", f"http://{server.http_url}"
    runs: dict[str, Callable[[], int]] = {
        "perf_analyzer, gRPC stream": lambda: analyzer.grpc(server),
        "perf_analyzer, chat": lambda: analyzer.openai("chat", gateway, "v1/chat/completions", CHAT),
        "perf_analyzer, completions": lambda: analyzer.openai("completions", gateway, "v1/completions", COMPLETION),
        "perf_analyzer, generate": lambda: analyzer.openai("generate", triton, "v2/models/ensemble/generate", GENERATE),
        "aiperf, chat": lambda: aiperf.profile(gateway, "chat", stream=False),
        "aiperf, streamed chat": lambda: aiperf.profile(gateway, "chat", stream=True),
        "aiperf, completions": lambda: aiperf.profile(gateway, "completions", stream=False),
        "aiperf, streamed completions": lambda: aiperf.profile(gateway, "completions", stream=True),
    }
    result = {}
    for name, run in runs.items():
        try:
            result[name] = run()
        except (RuntimeError, OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
            print(f"{name}: {error!r}\n{error}", file=sys.stderr)
            result[name] = -1
    return result


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
