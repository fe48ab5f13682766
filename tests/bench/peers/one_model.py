"""The peer `one Python model`: what Triton loads when tokenizer, engine and detokenizer are one model, as vLLM's backend has it.

The engine is this project's, in a thread of the stub's own process; another thread makes text and sends a response for every
step of every request, as <https://github.com/triton-inference-server/vllm_backend> does for each output of its engine.
"""

from __future__ import annotations

import itertools
import queue
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import triton_python_backend_utils as pb_utils

from backend.checkpoint.vocabulary import read_vocabulary
from backend.engine.events import EngineStats, RequestFailed, TokenEvent
from backend.engine.outbox import Outbox
from backend.engine.process import build_engine
from backend.engine.request import GenerationRequest
from backend.phases import Phases
from backend.settings import Settings
from backend.text.detokenizer import cut_text

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """Takes the engine's events in place of the outbox that carries them to another process."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model named by NEMO_CHECKPOINT and start the threads."""
        settings = Settings.load({"max_unsent_tokens": "0"})  # nobody tells this engine what was sent
        self._token_bytes = read_vocabulary(Path(settings.checkpoint)).token_bytes
        self._handles = itertools.count(1)
        self._senders: dict[int, Any] = {}
        self._events: queue.SimpleQueue[TokenEvent | RequestFailed | None] = queue.SimpleQueue()
        self._engine, _ = build_engine(settings, cast(Outbox, self), Phases())
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._engine.run, self._send)]
        for thread in self._threads:
            thread.start()

    def put(self, message: object) -> None:
        """What the engine says of its loading is not needed here."""

    def put_step(self, events: list[TokenEvent | RequestFailed], stats: EngineStats) -> None:
        """Called by the engine's loop after each step."""
        for event in events:
            self._events.put(event)

    def execute(self, requests: list[Any]) -> None:
        """Submit; responses come from the sending thread."""
        for request in requests:
            handle = next(self._handles)
            values = {tensor.name(): tensor.as_numpy()[0] for tensor in request.inputs()}
            self._senders[handle] = request.get_response_sender()
            self._engine.submit(
                GenerationRequest(
                    handle,
                    request.request_id(),
                    tuple(values["prompt_token_ids"].tolist()),
                    int(values["max_tokens"][0]),
                    ignore_eos=bool(values["ignore_eos"][0]) if "ignore_eos" in values else False,
                    stream=True,
                )
            )

    def finalize(self) -> None:
        """End the threads."""
        self._engine.stop()
        self._events.put(None)
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while (event := self._events.get()) is not None:
            if isinstance(event, RequestFailed):
                error = pb_utils.InferenceResponse(error=pb_utils.TritonError(event.message))
                self._senders.pop(event.handle).send(error, flags=_FINAL)
                continue
            text = cut_text(self._token_bytes, event.text_ids, event.text_skip_bytes, event.text_take_bytes)
            reason = "" if event.finish is None else event.finish.reason.value
            response = pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor("text_output", np.array([[text.encode()]], dtype=np.object_)),
                    pb_utils.Tensor("token_ids", np.array([event.token_ids], dtype=np.int32)),
                    pb_utils.Tensor("finish_reason", np.array([[reason.encode()]], dtype=np.object_)),
                ]
            )
            if event.is_request_end:
                self._senders.pop(event.handle).send(response, flags=_FINAL)
            else:
                self._senders[event.handle].send(response)
