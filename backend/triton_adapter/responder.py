"""Sends what the engine says to the clients, in a thread of its own, and notices the clients that are gone.

Every request has a Stream. The engine's receiving thread adds events to it and marks it as due; the sending thread takes due
streams in turn (turns.py) and sends what each has by then, as long as not too much is under way (chunk_window.py). So a stream
gets a response a token while postprocessing keeps up, and several tokens in one response when it does not. The engine is told
what was sent, so that no stream runs far ahead of its client (`max_unsent_tokens`).

A stream that is silent gets a beat from time to time: through an ensemble, postprocessing can only see that its client is gone
when a response passes by.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from backend.engine.events import Finish, TokenEvent
from backend.engine.joined_event import JoinedEvent
from backend.engine.request import GenerationRequest
from backend.errors import NemoError
from backend.triton_adapter import tensors
from backend.triton_adapter.chunk_window import ChunkWindow
from backend.triton_adapter.log_probs import drawn_tensors, prompt_tensor
from backend.triton_adapter.pending import PendingQueue
from backend.triton_adapter.request_log import log_failure, log_finish
from backend.triton_adapter.stream_chunk import StreamChunk
from backend.triton_adapter.turns import Turns

log = logging.getLogger("nemo.responder")
_BEAT_AFTER_S = 0.25
_MAX_BEATS_PER_S = 200
_TICK_S = 0.05
_LOOK_PERIOD_S = 0.002
"""Between two looks at a window that is full."""
_REPORT_PERIOD_S = 0.01
"""Between two reports of what was sent, while there is more to send."""


class Stream:
    """One request on its way back: what is pending, and how its client wants it.

    A response carries `stream_chunk` for the ensemble, or `token_ids` for a client that calls the engine directly; Triton tells
    which by the outputs that were requested.
    """

    def __init__(
        self, request: GenerationRequest, sender: Any, requested_outputs: set[str], max_tokens_per_response: int
    ) -> None:
        self.request = request
        self.sender = sender
        self.requested_outputs = requested_outputs
        self.needs_beats = "token_ids" not in requested_outputs
        self.pending = PendingQueue(is_streamed=request.stream, max_tokens=max_tokens_per_response)
        self.num_unfinished = request.num_return_sequences
        self.last_sent_s = time.monotonic()
        self.has_sent = False
        self.is_due = False
        self.failure: NemoError | None = None
        self._echoed: set[int] = set()
        self._cumulated: dict[int, float] = {}

    def response(self, pending: JoinedEvent, window: ChunkWindow) -> Any:
        """The response that carries `pending`; a chunk is numbered by `window` if it goes to postprocessing.

        NOTE: a client that calls the engine directly and names no outputs gets all of them, a chunk too, which nobody will see.
        """
        request = self.request
        number = window.next_number() if self.needs_beats else 0
        made = make_outputs(pending, request.handle, request.num_return_sequences, self.requested_outputs, number)
        return tensors.response(made + self._log_prob_tensors(pending))

    def num_generated(self, pending: JoinedEvent) -> int:
        """Ids of `pending`, which is sent now, that are no echo; that stands before the first ones of each sequence."""
        is_echo = self.request.echo and bool(pending.token_ids) and pending.sequence_index not in self._echoed
        self._echoed |= {pending.sequence_index} if is_echo else set()
        return len(pending.token_ids) - (len(self.request.prompt_token_ids) if is_echo else 0)

    def _log_prob_tensors(self, pending: JoinedEvent) -> list[Any]:
        made = []
        if pending.log_probs:
            cumulated = self._cumulated.get(pending.sequence_index, 0.0) + sum(
                each.log_prob for each in pending.log_probs
            )
            self._cumulated[pending.sequence_index] = cumulated
            made += drawn_tensors(
                pending.token_ids, pending.log_probs, cumulated, has_alternatives=bool(self.request.num_logprobs)
            )
        if pending.finish is not None and self.request.num_prompt_logprobs is not None and pending.sequence_index == 0:
            made.append(prompt_tensor(self.request.prompt_token_ids, pending.finish.prompt_log_probs))
        return [tensor for tensor in made if tensor.name() in self.requested_outputs]

    def beat(self, window: ChunkWindow) -> Any:
        """A response that carries nothing."""
        chunk = StreamChunk(self.request.handle, is_beat=True, number=window.next_number())
        return tensors.response([tensors.array_tensor("stream_chunk", chunk.pack())])


def make_outputs(
    pending: JoinedEvent, handle: int, num_return_sequences: int, requested_outputs: set[str], chunk_number: int
) -> list[Any]:
    """Those of the requested outputs that `pending` has something for, less log-probabilities."""
    outputs = []
    if "stream_chunk" in requested_outputs:
        chunk = StreamChunk(
            handle,
            pending.sequence_index,
            num_return_sequences,
            tuple(pending.token_ids),
            tuple(pending.text_ids),
            pending.text_skip_bytes,
            pending.text_take_bytes,
            number=chunk_number,
        )
        outputs.append(tensors.array_tensor("stream_chunk", chunk.pack()))
    if "token_ids" in requested_outputs:
        outputs.append(tensors.int_tensor("token_ids", pending.token_ids))
        if num_return_sequences > 1 and "sequence_index" in requested_outputs:
            outputs.append(tensors.int_tensor("sequence_index", [pending.sequence_index]))
    if pending.finish is not None:
        outputs += [tensor for tensor in _finish_tensors(pending.finish) if tensor.name() in requested_outputs]
    return outputs


def _finish_tensors(finish: Finish) -> list[Any]:
    num_reused_pages = finish.num_cached_tokens // 64
    counts = {
        "num_input_tokens": finish.num_input_tokens,
        "num_output_tokens": finish.num_output_tokens,
        "num_cached_tokens": finish.num_cached_tokens,
        "kv_cache_reused_blocks": num_reused_pages,
    }
    times = {
        "arrival_time_ns": finish.arrival_time_ns,
        "first_scheduled_time_ns": finish.first_scheduled_time_ns,
        "first_token_time_ns": finish.first_token_time_ns,
        "last_token_time_ns": finish.last_token_time_ns,
    }
    return [
        tensors.text_tensor("finish_reason", finish.reason.value),
        tensors.text_tensor("stop_reason", finish.stop_reason),
        *(tensors.int_tensor(name, [value]) for name, value in counts.items()),
        *(tensors.int_tensor(name, [value], np.int64) for name, value in times.items()),
    ]


class Responder:
    """Owns the streams.

    `abort` takes a handle back at the engine, `report_sent` (None: nobody asks) is told how many generated ids of which streams
    were sent, by handle, `on_response` the number of tokens of each response, and `on_tick` runs about twenty times a second.
    """

    def __init__(
        self,
        abort: Callable[[int], None],
        report_sent: Callable[[dict[int, int]], None] | None,
        on_response: Callable[[int], None],
        on_tick: Callable[[], None],
    ) -> None:
        self._abort = abort
        self._report_sent = report_sent
        self._sent: defaultdict[int, int] = defaultdict(int)
        self._on_response = on_response
        self._on_tick = on_tick
        self._streams: dict[int, Stream] = {}
        self._turns: Turns[Stream] = Turns()
        self._window = ChunkWindow()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._send_forever, name="responder", daemon=True)
        self._thread.start()

    def open(self, stream: Stream) -> None:
        """Register a stream before its request goes to the engine."""
        with self._changed:
            self._streams[stream.request.handle] = stream

    def forget(self, stream: Stream) -> None:
        """Drop a stream whose request never reached the engine."""
        with self._changed:
            self._streams.pop(stream.request.handle, None)

    def add(self, events: Iterable[TokenEvent]) -> None:
        """Take over the tokens of a step."""
        with self._changed:
            for event in events:
                stream = self._streams.get(event.handle)
                if stream is not None and stream.pending.add(event):
                    self._turns.add(stream)
            self._changed.notify()

    def fail(self, handle: int, error: NemoError) -> None:
        """Answer a request with an error."""
        with self._changed:
            stream = self._streams.get(handle)
            if stream is not None:
                stream.failure = error
                self._turns.add(stream)
            self._changed.notify()

    def fail_all(self, error: NemoError) -> int:
        """Answer every request with an error (the engine is gone) and return how many there were."""
        with self._changed:
            handles = list(self._streams)
        for handle in handles:
            self.fail(handle, error)
        return len(handles)

    def close(self) -> None:
        """Send what is due, then end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _send_forever(self) -> None:
        ticked_s = reported_s = time.monotonic()
        while True:
            with self._changed:
                stream = self._next_stream(ticked_s + _TICK_S)
                if stream is None and self._is_closing and not self._turns:
                    return
                taken = self._take(stream) if stream is not None else []
            if stream is not None:
                self._send(stream, taken)
            now_s = time.monotonic()
            if (
                self._report_sent is not None
                and self._sent
                and (not self._turns or now_s >= reported_s + _REPORT_PERIOD_S)
            ):
                reported_s = now_s
                self._report_sent(dict(self._sent))
                self._sent.clear()
            if now_s >= ticked_s + _TICK_S:
                ticked_s = now_s
                self._tick()

    def _next_stream(self, next_tick_s: float) -> Stream | None:
        """Whose turn it is, or None after a wait until something changed or the next tick; when closing, nobody waits."""
        now_s = time.monotonic()
        is_full = self._window.is_full(now_s) and not self._is_closing
        stream = None if is_full else self._turns.pop()
        if stream is None and not self._is_closing:
            self._changed.wait(timeout=max(0.0, min(next_tick_s - now_s, _LOOK_PERIOD_S if is_full else _TICK_S)))
        return stream

    def _take(self, stream: Stream) -> list[JoinedEvent]:
        stream.has_sent = True
        taken = stream.pending.take(everything=stream.failure is not None)
        if stream.pending.has_more:
            self._turns.add(stream)  # behind the others
        stream.num_unfinished -= sum(pending.finish is not None for pending in taken)
        if stream.num_unfinished == 0 or stream.failure is not None:
            self._streams.pop(stream.request.handle, None)
        return taken

    def _send(self, stream: Stream, taken: list[JoinedEvent]) -> None:
        try:
            for position, pending in enumerate(taken):
                is_last = stream.num_unfinished == 0 and position == len(taken) - 1
                stream.sender.send(stream.response(pending, self._window), flags=tensors.FINAL if is_last else 0)
                self._on_response(len(pending.token_ids))
                if self._report_sent is not None and stream.request.stream and not is_last:
                    self._sent[stream.request.handle] += stream.num_generated(pending)
                if pending.finish is not None:
                    log_finish(stream.request.request_id, pending.finish)
            if stream.failure is not None and stream.num_unfinished > 0:
                stream.sender.send(tensors.error_response(stream.failure), flags=tensors.FINAL)
                log_failure(stream.request.request_id, stream.failure)
        except Exception:  # one client's broken connection must not stop the others' answers
            log.exception("the response to request %r could not be sent", stream.request.request_id)
            self._abort(stream.request.handle)
        stream.last_sent_s = time.monotonic()

    def _tick(self) -> None:
        """Look after silent streams, then let the owner update its metrics."""
        now_s = time.monotonic()
        with self._changed:
            streams = list(self._streams.values())
            silent = [
                stream
                for stream in streams
                if stream.needs_beats and not stream.is_due and now_s - stream.last_sent_s >= _BEAT_AFTER_S
            ]
        silent.sort(key=lambda stream: stream.last_sent_s)
        for stream in silent[: int(_MAX_BEATS_PER_S * _TICK_S)]:
            stream.last_sent_s = now_s
            stream.sender.send(stream.beat(self._window), flags=0)
        for stream in streams:
            if not stream.needs_beats and stream.sender.is_cancelled():
                self._abort(stream.request.handle)
        self._on_tick()
