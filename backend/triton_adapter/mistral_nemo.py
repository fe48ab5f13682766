"""The model `mistral_nemo`: Triton's side of the engine. It decodes requests, owns the engine process and the answers."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

from backend.engine import messages
from backend.engine.engine_process import EngineProcess
from backend.engine.events import FailureKind, Finish, FinishReason, RequestFailed
from backend.engine.joined_event import JoinedEvent
from backend.errors import Cancelled, DeadlineExceeded, EngineFailure, NemoError, QueueFull, RequestError
from backend.logs import start_logging
from backend.settings import Settings
from backend.triton_adapter import tensors
from backend.triton_adapter.generation_inputs import generation_request
from backend.triton_adapter.metrics import Metrics
from backend.triton_adapter.presence import announce, num_restarts, withdraw
from backend.triton_adapter.request_log import log_failure
from backend.triton_adapter.responder import Responder, Stream, make_outputs
from backend.triton_adapter.tensors import Inputs

log = logging.getLogger("nemo.engine")
_LOADING_PERIOD_S = 1.0
_ERRORS: dict[FailureKind, type[NemoError]] = {
    FailureKind.QUEUE_FULL: QueueFull,
    FailureKind.DEADLINE: DeadlineExceeded,
    FailureKind.CANCELLED: Cancelled,
    FailureKind.ENGINE: EngineFailure,
}


class MistralNemo:
    """Starts the engine, submits requests, and answers all of them with an error when the engine dies."""

    def __init__(self, model_config: dict[str, Any]) -> None:
        parameters = {name: value["string_value"] for name, value in model_config.get("parameters", {}).items()}
        self._settings = Settings.load({name: value for name, value in parameters.items() if name not in _TRITONS_OWN})
        start_logging(self._settings.log_level, self._settings.log_format)
        self._input_names = tensors.input_names(model_config)
        self._death: str | None = None
        self._lock = threading.Lock()
        sys.setswitchinterval(messages.SWITCH_INTERVAL_S)
        announce("mistral_nemo")
        self._metrics = Metrics()
        self._engine = EngineProcess(self._settings, self._on_step, self._on_death)
        report_sent = self._note_sent if self._settings.max_unsent_tokens else None
        self._responder = Responder(self._abort, report_sent, self._metrics.observe_response, self._metrics.publish)
        self._bounds = self._engine.start(LoadingLog())
        self._metrics.set_bounds(self._bounds.max_num_seqs, self._bounds.num_pages)
        self._metrics.set_num_restarts(num_restarts())
        self._metrics.publish_description(self._bounds.description)
        for name, value in sorted(self._bounds.description.items()):
            log.info("%s: %s", name, value)
        announce("engine", pid=self._engine.pid)

    def execute(self, requests: list[Any]) -> None:
        """Submit each request; a bad one is answered at once and alone."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except NemoError as error:
                self._metrics.observe_failures(error)
                log_failure(tensors.request_id(request), error)
                sender.send(tensors.error_response(error), flags=tensors.FINAL)
            except Exception as error:  # a bug of ours must fail this request alone
                log.exception("request %r failed", tensors.request_id(request))
                self._metrics.observe_failures(error)
                sender.send(tensors.error_response(error), flags=tensors.FINAL)

    def close(self) -> None:
        """Send what is due and end the engine."""
        withdraw("engine", pid=self._engine.pid)
        withdraw("mistral_nemo")
        self._responder.close()
        self._engine.close()

    def _accept(self, request: Any, sender: Any) -> None:
        tensors.refuse_parameters(request, self._input_names)
        inputs = Inputs(request)
        if inputs.has("abort_handle"):
            self._abort(inputs.number("abort_handle"))
            sender.send(flags=tensors.FINAL)
            return
        if inputs.number("stop"):
            self._stop(request, sender)
            return
        generation = generation_request(
            inputs,
            request.request_id(),
            default_max_tokens=self._settings.default_max_tokens,
            max_model_len=self._bounds.max_model_len,
        )
        generation.validate(self._bounds.vocab_size, self._bounds.max_model_len)
        outputs = set(request.requested_output_names())
        stream = Stream(generation, sender, outputs, self._settings.max_tokens_per_response)
        with self._lock:
            if self._death is not None:
                raise EngineFailure(self._death)
            self._responder.open(stream)
        try:
            self._engine.submit(generation)
        except EngineFailure as error:
            self._responder.fail(generation.handle, error)

    def _stop(self, request: Any, sender: Any) -> None:
        """Take back what runs under the client's request id; answered with the ending of nothing."""
        if not request.request_id():
            raise RequestError("stop", "needs the request id of the requests to stop, got an empty one")
        self._engine.abort_request_id(request.request_id())
        nothing = JoinedEvent(0, 0, finish=Finish(FinishReason.CANCELLED, "", 0, 0, 0, 0, 0, 0, 0))
        sender.send(
            tensors.response(make_outputs(nothing, 0, 1, set(request.requested_output_names()), 0)), flags=tensors.FINAL
        )

    def _abort(self, handle: int) -> None:
        if self._death is None:
            self._engine.abort(handle)

    def _note_sent(self, counts: dict[int, int]) -> None:
        if self._death is None:
            self._engine.note_sent(counts)

    def _on_step(self, step: messages.Step) -> None:
        self._responder.add(step.tokens)
        for failed in step.failed:
            error = _error_of(failed)
            self._metrics.observe_failures(error)
            self._responder.fail(failed.handle, error)
        self._metrics.observe_step(step)

    def _on_death(self, reason: str) -> None:
        log.error("%s; requests are refused until it is restarted", reason)
        with self._lock:
            self._death = f"{reason}; it is being restarted, try again soon"
        error = EngineFailure(self._death)
        self._metrics.observe_failures(error, self._responder.fail_all(error))
        announce("engine", pid=self._engine.pid, failure=reason)


_TRITONS_OWN = {"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS", "TRITON_BACKEND_PATH"}


def _error_of(failed: RequestFailed) -> NemoError:
    if failed.kind is FailureKind.INVALID:
        field, _, problem = failed.message.partition(": ")
        return RequestError(field, problem)
    return _ERRORS[failed.kind](failed.message)


class LoadingLog:
    """Logs progress while the engine loads, a line every second at most."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + _LOADING_PERIOD_S

    def __call__(self, loading: messages.Loading) -> None:
        """Log one message if it is time."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _LOADING_PERIOD_S
        done, total = loading.bytes_done / 1e6, loading.bytes_total / 1e6
        log.info("loading %s: %.0f of %.0f MB", loading.what, done, total)
