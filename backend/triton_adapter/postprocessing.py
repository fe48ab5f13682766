"""The model `postprocessing`: what the engine sends becomes text. A pure function of each response; no state of a stream.

It is also the only step that can see that the client of an ensemble request is gone (Triton does not pass a cancellation on
to a decoupled model in the middle), so it takes the request back at the engine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from backend.checkpoint.vocabulary import read_vocabulary
from backend.errors import RequestError, one_line
from backend.logs import start_logging
from backend.settings import Settings, read_model_parameters
from backend.text.detokenizer import cut_text
from backend.triton_adapter import tensors
from backend.triton_adapter.chunk_window import SeenChunks
from backend.triton_adapter.log_probs import with_bytes
from backend.triton_adapter.presence import announce, withdraw
from backend.triton_adapter.stream_chunk import StreamChunk
from backend.triton_adapter.tensors import Inputs

log = logging.getLogger("nemo.postprocessing")
_NUM_REMEMBERED_ABORTS = 4096


class Postprocessing:
    """Chunks -> `text_output` and `token_ids`; everything else the engine says of an ending is passed on as it is.

    Called by hand with `token_ids` it gives their text.
    """

    def __init__(self, repository: Path) -> None:
        settings = Settings.load(read_model_parameters(repository / "mistral_nemo" / "config.pbtxt"))
        start_logging(settings.log_level, settings.log_format)
        self._token_bytes = read_vocabulary(Path(settings.checkpoint)).token_bytes
        self._seen = SeenChunks()
        self._aborted: deque[int] = deque(maxlen=_NUM_REMEMBERED_ABORTS)
        announce("postprocessing")

    def close(self) -> None:
        """This process ends because the model is unloaded: the supervisor is not to take it for dead."""
        withdraw("postprocessing")

    def execute(self, requests: list[Any]) -> None:
        """Answer each response of the engine; a beat is answered with nothing but its final flag."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                answer = self._answer(request)
            except RequestError as error:
                answer = tensors.error_response(error)
            except Exception as error:  # a bug of ours must fail this request alone
                log.exception("request %r failed", tensors.request_id(request))
                answer = tensors.error_response(error)
            if answer is None:
                sender.send(flags=tensors.FINAL)
            else:
                sender.send(answer, flags=tensors.FINAL)

    def _answer(self, request: Any) -> Any:
        inputs = {tensor.name(): tensor for tensor in request.inputs()}
        if ("token_ids" in inputs) == ("stream_chunk" in inputs):
            raise RequestError("token_ids", "exactly one of token_ids and stream_chunk must be given")
        if "token_ids" in inputs:
            return tensors.response([tensors.text_tensor("text_output", self._text(Inputs(request)))])
        # What a client sends here by hand instead of the engine is the client's mistake.
        with _blaming("stream_chunk"):
            chunk = StreamChunk.unpack(inputs.pop("stream_chunk").as_numpy())
        self._seen.note(chunk.number)
        if request.is_cancelled():
            self._abort(chunk.handle, tensors.request_id(request))
            return None
        if chunk.is_beat:
            return None
        with _blaming("stream_chunk"):
            text = cut_text(self._token_bytes, chunk.text_ids, chunk.text_skip_bytes, chunk.text_take_bytes)
        outputs = [tensors.text_tensor("text_output", text), tensors.int_tensor("token_ids", chunk.token_ids)]
        if chunk.num_return_sequences > 1:
            outputs.append(tensors.int_tensor("sequence_index", [chunk.sequence_index]))
        outputs += [self._passed_on(name, tensor.as_numpy()) for name, tensor in inputs.items()]
        return tensors.response(outputs)

    def _text(self, inputs: Inputs) -> str:
        """The text of ids that a client gave."""
        token_ids = inputs.numbers("token_ids") or []
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < len(self._token_bytes):
                bound = len(self._token_bytes) - 1
                raise RequestError("token_ids", f"ids must be in [0, {bound}], got {token_id} at index {index}")
        num_bytes = sum(len(self._token_bytes[token_id]) for token_id in token_ids)
        return cut_text(self._token_bytes, token_ids, 0, num_bytes)

    def _passed_on(self, name: str, values: Any) -> Any:
        """A tensor of the engine as it is; alternatives get the bytes of their ids."""
        if name in ("top_log_probs", "prompt_log_probs"):
            with _blaming(name):
                (encoded,) = values.reshape(-1)
                return tensors.text_tensor(name, with_bytes(encoded, self._token_bytes))
        return tensors.array_tensor(name, values)

    def _abort(self, handle: int, request_id: str) -> None:
        """Tell the engine, once for each handle."""
        if handle in self._aborted:
            return
        self._aborted.append(handle)
        abort = pb_utils.InferenceRequest(
            model_name="mistral_nemo",
            request_id=request_id,
            inputs=[pb_utils.Tensor("abort_handle", np.array([[handle]], dtype=np.uint64))],
            requested_output_names=["token_ids"],
        )
        for answer in abort.exec(decoupled=True):
            if answer.has_error():
                log.warning("request %r could not be taken back: %s", request_id, answer.error().message())


@contextmanager
def _blaming(field: str) -> Iterator[None]:
    """Turn a ValueError into the RequestError of a field."""
    try:
        yield
    except ValueError as error:
        raise RequestError(field, one_line(str(error).removeprefix(f"{field}: "))) from error
