"""The supervisor behind `make serve` and the container's entry point: it owns the signals and the server's life.

    check -> start tritonserver -> load the models -> ask one question -> watch -> drain -> end

It alone loads and unloads models. When the engine dies, it unloads `mistral_nemo` (readiness says no) and loads it again; when
a stub or the server itself dies, it starts the server anew. SIGTERM and Ctrl-C drain; a second one does not wait. The OpenAI
gateway is started first, so that it can say that the models are loading, and drained first.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from backend.checkpoint.model_config import read_model_config
from backend.errors import ConfigError, EngineFailure, NemoError
from backend.exposure import GrpcTls
from backend.gateway_process import GatewayProcess
from backend.installation import PROJECT, check_machine, find_installation, find_libpython
from backend.logs import start_logging
from backend.phases import Phases, process_began_s
from backend.server_process import STUBS, Ports, ServerProcess
from backend.settings import Settings, read_model_parameters

log = logging.getLogger("nemo.serve")
DEMO_CHECKPOINT = PROJECT / "tests" / "demo" / "checkpoint"
DEMO_QUESTION = "What is Mistral NeMo?"
_POLL_S = 0.2
_POLL_BEGUN_S = 0.02
_OPENAI_HINT = """  openai:  OpenAI(base_url="{url}/v1", api_key="none").chat.completions.create(model="{model}", messages=[...])
Page:      {url}/
"""
_MAX_RESTARTS_IN_A_ROW = 5
_STEADY_AFTER_S = 60.0


class Supervisor:
    """Keeps one server running until it is told to stop."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings) -> None:
        self._arguments = arguments
        self._settings = settings
        self._tls = grpc_tls(arguments)
        self._ports = Ports(arguments.http_port, arguments.grpc_port, arguments.metrics_port)
        self._num_stop_signals = 0
        self._num_restarts = 0
        self._steady_since_s = 0.0
        self._server: ServerProcess
        self._gateway: GatewayProcess | None = None
        if arguments.openai_port:
            self._gateway = GatewayProcess(
                arguments.openai_port,
                arguments.grpc_port,
                arguments.metrics_port,
                arguments.model_name,
                arguments.grace_s,
            )
        self._installation = find_installation()
        self._libpython = find_libpython()

    def run(self) -> int:
        """Serve until a signal; exit status 0 after a drain, 1 when the server cannot be kept running."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        phases = Phases(process_began_s())
        try:
            phases.end("checks")
            if self._gateway is not None:
                self._gateway.start()
            self._start(phases)
            if not self._is_stopping:
                log.info("ready in %s", phases.line(), extra=phases.fields())
                self._greet()
            while not self._is_stopping:
                self._watch()
                time.sleep(_POLL_S)
            self._drain()
        except NemoError as error:
            log.error("%s", error)
            return 1
        finally:
            if self._gateway is not None:
                self._gateway.kill()
            if hasattr(self, "_server"):
                self._server.end()
        log.info("stopped")
        return 0

    @property
    def _is_stopping(self) -> bool:
        return self._num_stop_signals > 0

    def _on_signal(self, number: int, _: object) -> None:
        self._num_stop_signals += 1

    def _start(self, phases: Phases) -> None:
        """Start a server and load the models into it; `phases` gets the seconds of each."""
        log.info("starting tritonserver (%s) with %s", self._installation.source, self._settings.checkpoint)
        self._server = ServerProcess(self._installation, self._libpython, self._ports, self._settings, self._tls)
        self._server.wait_until_live(lambda: not self._is_stopping)
        phases.end("tritonserver")
        self._load_together(STUBS)
        phases.end("models")
        self._load_together(("ensemble",))
        if not self._is_stopping:
            self._server.api.check_tensors()
            self._steady_since_s = time.monotonic()
        phases.end("ensemble")

    def _load_together(self, models: Sequence[str]) -> None:
        """Load models at the same time; a signal or a failure ends the server, since loading cannot be stopped otherwise."""
        if self._num_stop_signals:
            return
        with ThreadPoolExecutor(len(models)) as pool:
            loads = []
            for model in models:
                loads.append(pool.submit(self._load, model))
                self._wait_until_begun(model, loads[-1])
            while (waited := wait(loads, _POLL_S, FIRST_EXCEPTION)).not_done:
                if self._gateway is not None:
                    self._gateway.watch()
                if self._is_stopping or any(load.exception() for load in waited.done):
                    self._server.kill()
                    break
        for load in waited.done:
            load.result()

    def _wait_until_begun(self, model: str, load: Future[None]) -> None:
        """Server 2.51 serves a connection in the HTTP thread that accepted it, and a load keeps that thread to its end.

        Were the next load's connection accepted before, by the same thread, it would wait for this one.
        """
        while not load.done() and not self._is_stopping:
            with contextlib.suppress(OSError, EngineFailure):
                if self._server.api.has_begun_to_load(model):
                    return
            time.sleep(_POLL_BEGUN_S)

    def _load(self, model: str) -> None:
        started_s = time.monotonic()
        try:
            self._server.api.load(model)
        except OSError as error:
            raise EngineFailure(f"the server did not answer while loading {model}: {error}") from error
        log.info("loaded %s in %.1f s", model, time.monotonic() - started_s)

    def _greet(self) -> None:
        """Ask the first question as any client would, then say how to ask more."""
        if self._settings.log_format == "json":
            return  # nothing but JSON may go out
        http, grpc = self._ports.http, self._ports.grpc
        openai = f"http://127.0.0.1:{self._gateway.port}" if self._gateway is not None else ""
        if self._arguments.question and self._tls is None:
            print(f"\n> {self._arguments.question}", flush=True)
            command = [sys.executable, "-m", "client", "--url", f"127.0.0.1:{grpc}", self._arguments.question]
            asked_s = time.monotonic()
            asking = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL)
            while asking.poll() is None and not self._is_stopping:
                time.sleep(_POLL_S)
            asking.terminate()
            if asking.wait() == 0:
                log.info("first question answered in %.1f s", time.monotonic() - asked_s)
            elif not self._is_stopping:
                log.warning("the first question was not answered")
        body = '{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"Hello\\"}]", "stream": true}'
        print(
            f"""
Ask more:
  .venv/bin/python -m client --url 127.0.0.1:{grpc} "What is Tekken?"
  curl -N http://127.0.0.1:{http}/v2/models/ensemble/generate_stream -d '{body}'
  python:  from client import Client
           for response in Client("127.0.0.1:{grpc}").generate(prompt="..."): print(response.text, end="")
{_OPENAI_HINT.format(url=openai, model=self._arguments.model_name) if openai else ""}Metrics:   http://127.0.0.1:{self._ports.metrics}/metrics
Readiness: http://127.0.0.1:{http}/v2/models/ensemble/ready
Ctrl-C stops after the running answers are finished.
""",
            flush=True,
        )

    def _watch(self) -> None:
        """Look once whether everything lives, and mend what does not; what could not be mended is seen the next time."""
        if self._gateway is not None:
            self._gateway.watch()
        if time.monotonic() - self._steady_since_s > _STEADY_AFTER_S:
            self._num_restarts = 0
        problem = self._server.death() or self._server.engine_failure()
        if problem is None or not self._may_restart():
            return
        try:
            if self._server.death() is not None:
                log.error("%s; starting the server anew", problem)
                self._server.kill()
                self._start(Phases())
            else:
                log.error("%s; restarting it", problem)
                self._server.api.unload("mistral_nemo")
                self._server.count_engine_restart()
                self._load_together(("mistral_nemo",))
                self._load_together(("ensemble",))
                self._steady_since_s = time.monotonic()
            if not self._is_stopping:
                log.info("ready again")
        except (EngineFailure, OSError) as error:
            log.error("%s", error)

    def _may_restart(self) -> bool:
        """Wait longer before each restart that follows soon; EngineFailure when there were too many, False on a signal."""
        self._num_restarts += 1
        if self._num_restarts > _MAX_RESTARTS_IN_A_ROW:
            raise EngineFailure(f"given up after {_MAX_RESTARTS_IN_A_ROW} restarts in a row")
        end_s = time.monotonic() + min(8.0, 0.25 * 2 ** (self._num_restarts - 1)) - 0.25
        while time.monotonic() < end_s and not self._is_stopping:
            time.sleep(_POLL_S)
        return not self._is_stopping

    def _drain(self) -> None:
        """Let running answers finish, within the grace period, or until a second signal; the gateway's before the server's."""
        end_s = time.monotonic() + self._arguments.grace_s
        if self._gateway is not None:
            self._gateway.drain(lambda: self._num_stop_signals == 1)
        if self._server.exit_status is not None or not self._server.api.is_ready("mistral_nemo"):
            return
        log.info("draining: no new requests, %.0f s for the running ones", self._arguments.grace_s)
        try:
            if not self._server.drain(max(0.0, end_s - time.monotonic()), lambda: self._num_stop_signals == 1):
                log.warning("the grace period is over: what still ran was taken back")
        except OSError as error:
            log.error("the server stopped answering while draining: %s", error)


def check_ports(ports: dict[str, int]) -> None:
    """Refuse a port that somebody listens on, or that two of ours share."""
    if len(set(ports.values())) < len(ports):
        raise ConfigError(f"ports must differ: {', '.join(f'{name} {port}' for name, port in ports.items())}")
    for name, port in ports.items():
        if not 1 <= port <= 65535:
            raise ConfigError(f"{name}: must be in [1, 65535], got {port}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError as error:
                raise ConfigError(
                    f"port {port} cannot be used ({error.strerror}): stop what listens there, or choose another: "
                    f"make serve {name}=..."
                ) from None


def grpc_tls(arguments: argparse.Namespace) -> GrpcTls | None:
    """TLS of the gRPC port, if it is asked for; ConfigError when it is asked for by halves."""
    cert, key, client_ca = arguments.grpc_tls_cert, arguments.grpc_tls_key, arguments.grpc_tls_client_ca
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ConfigError("--grpc-tls-cert and --grpc-tls-key: must be given both, or neither")
    if arguments.openai_port:
        raise ConfigError(
            "--grpc-tls-cert: the OpenAI gateway speaks gRPC without TLS to this server; leave it out with --openai-port 0 "
            "(and run `python -m client.gateway` elsewhere), or end TLS in front of the port"
        )
    return GrpcTls(cert, key, client_ca)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m backend.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=None, help="checkpoint folder (default: the shipped demo)")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--openai-port", type=int, default=9000, help="of the OpenAI gateway; 0: none")
    parser.add_argument(
        "--model-name",
        default=os.environ.get("GATEWAY_MODEL_NAME") or "mistral-nemo",
        help="what OpenAI clients call the model; several by commas",
    )
    parser.add_argument("--grace-s", type=float, default=30.0, help="seconds a drain waits for running requests")
    parser.add_argument("--grpc-tls-cert", type=Path, help="PEM file: the gRPC port speaks TLS with this certificate")
    parser.add_argument("--grpc-tls-key", type=Path, help="PEM file: its private key")
    parser.add_argument("--grpc-tls-client-ca", type=Path, help="PEM file: clients must show a certificate of this CA")
    parser.add_argument("--question", default=DEMO_QUESTION, help="asked once at the start; empty: none")
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Check everything that can be checked before anything starts, then supervise."""
    start_logging("info", os.environ.get("NEMO_LOG_FORMAT", "text"))  # until the settings are read
    arguments = parse_arguments(argv)
    try:
        check_machine()
        chosen = arguments.checkpoint or Path(os.environ.get("NEMO_CHECKPOINT") or DEMO_CHECKPOINT)
        parameters = read_model_parameters(PROJECT / "model_repository" / "mistral_nemo" / "config.pbtxt")
        settings = Settings.load(parameters, os.environ | {"NEMO_CHECKPOINT": str(chosen.resolve())})
        start_logging(settings.log_level, settings.log_format)
        read_model_config(Path(settings.checkpoint))
        ports = {
            "HTTP_PORT": arguments.http_port,
            "GRPC_PORT": arguments.grpc_port,
            "METRICS_PORT": arguments.metrics_port,
            "OPENAI_PORT": arguments.openai_port,
        }
        check_ports({name: port for name, port in ports.items() if name != "OPENAI_PORT" or port})
        supervisor = Supervisor(arguments, settings)
    except ConfigError as error:
        log.error("%s", error)
        return 1
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
