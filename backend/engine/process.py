"""The engine as a process of its own: a device fault or a crash ends this process and nothing else.

    main thread     the engine loop
    reader          messages of the owner -> the loop's inbox; end of file ends the process
    life            tells the owner every second how long the loop has been in its turn
    writer          the loop's events -> messages (outbox.py), so that a slow owner never holds up a step

Started by EngineProcess (engine_process.py) with the number of an inherited socket. SIGINT is ignored (Ctrl-C reaches the
whole terminal group); SIGTERM takes every request back, which is how a supervisor ends a drain; the death of the owner
kills this process at once, so that no orphan keeps a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from backend.checkpoint.vocabulary import Vocabulary, read_vocabulary
from backend.engine import messages
from backend.engine.engine import Engine
from backend.engine.guide import GuideCompiler
from backend.engine.outbox import Outbox
from backend.engine.plan import PAGE_TOKENS
from backend.engine.recording import RecordingScheduler
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.errors import ConfigError
from backend.logs import start_logging
from backend.phases import Phases, process_began_s
from backend.runner.select import make_runner
from backend.settings import Settings

log = logging.getLogger("nemo.engine")
_PR_SET_PDEATHSIG = 1
_LIFE_PERIOD_S = 1.0


def make_scheduler(settings: Settings, limits: SchedulerLimits, vocabulary: Vocabulary) -> Scheduler:
    """A Scheduler; one that writes a recording when it is asked for. ConfigError when it cannot be written."""
    if not settings.recording:
        return Scheduler(limits, vocabulary.token_bytes, vocabulary.eos_id)
    path = Path(settings.recording, f"engine-{os.getpid()}.rec")
    try:
        file = path.open("wb")
    except OSError as error:
        raise ConfigError(f"setting recording: {path} cannot be written: {error.strerror}") from error
    log.info("everything that is asked and planned is written to %s", path)
    most_bytes = settings.recording_max_mb * 10**6
    return RecordingScheduler(limits, vocabulary.token_bytes, vocabulary.eos_id, file, most_bytes)


def build_engine(settings: Settings, outbox: Outbox, phases: Phases) -> tuple[Engine, messages.Ready]:
    """Load everything `settings` names; the engine, and what its owner is told of it. ConfigError when it cannot be served."""
    vocabulary = read_vocabulary(Path(settings.checkpoint))
    phases.end("vocabulary")
    served = make_runner(settings, lambda what, done, total: outbox.put(messages.Loading(what, done, total)), phases)
    if len(vocabulary.token_bytes) != served.vocab_size:
        raise ConfigError(
            f"{settings.checkpoint}: the tokenizer has {len(vocabulary.token_bytes)} tokens, the model's vocabulary "
            f"{served.vocab_size}; they belong to different checkpoints"
        )
    # A longer request would wait at the head of the queue for ever.
    assert served.max_model_len <= served.runner.num_pages * PAGE_TOKENS, (
        "the KV pages hold every request that is allowed"
    )
    limits = SchedulerLimits(
        num_pages=served.runner.num_pages,
        num_host_pages=served.runner.num_host_pages,
        max_queued_tokens=settings.max_queued_tokens,
        has_prefix_cache=settings.prefix_cache,
        max_unsent_tokens=settings.max_unsent_tokens,
        caches_outputs=served.runner.caches_outputs,
        max_num_seqs=served.runner.max_num_seqs,
        max_step_tokens=settings.max_step_tokens,
        max_queued_requests=settings.max_queued_requests,
        default_deadline_ms=settings.default_deadline_ms,
    )
    scheduler = make_scheduler(settings, limits, vocabulary)
    ready = messages.Ready(
        served.vocab_size,
        served.max_model_len,
        limits.max_num_seqs,
        limits.num_pages,
        served.step_timeout_s,
        served.runner.describe() | served.description,
    )
    compile_guide = None
    if served.has_guides:
        compiler = GuideCompiler(vocabulary)
        compile_guide = lambda spec, num_matchers: compiler.compile(spec.kind, spec.text, num_matchers)  # noqa: E731
    return Engine(scheduler, served.runner, outbox.put_step, compile_guide), ready


def read_orders(connection: Connection, engine: Engine) -> None:
    """Pass the owner's messages on until it closes the connection (or one cannot be read), then end the engine."""
    try:
        while True:
            message = messages.receive_in_engine(connection)
            if isinstance(message, messages.Submit):
                engine.submit(message.request)
            elif isinstance(message, messages.Abort):
                engine.abort(message.handle)
            elif isinstance(message, messages.AbortRequestId):
                engine.abort_request_id(message.request_id)
            elif isinstance(message, messages.Sent):
                engine.note_sent(message.counts)
    except (EOFError, OSError):
        log.debug("the owner closed the connection")
    finally:
        engine.stop()


def report_life(engine: Engine, outbox: Outbox) -> None:
    """Tell the owner every second how long the loop has been in its turn; it decides what is stuck."""
    while True:
        outbox.put(messages.Alive(engine.turn_age_s))
        time.sleep(_LIFE_PERIOD_S)


def keep_what_is_loaded() -> None:
    """Take what start-up left out of the garbage collector's sight: it stays, and there is ten times more of it than of requests.

    The collection after that makes the collector count anew. Otherwise it waits for as much new garbage as a quarter of that, and
    memory grows for tens of thousands of requests.
    """
    gc.collect()
    gc.freeze()
    gc.collect()


def end_process(uncaught: threading.ExceptHookArgs) -> None:
    """A thread is gone (out of memory, or a bug of ours) and others would wait for it for ever: the owner answers them all."""
    try:
        log.critical("the thread %s failed", uncaught.thread and uncaught.thread.name, exc_info=uncaught.exc_value)
    finally:
        os._exit(1)


def main(file_descriptor: int) -> int:
    """Serve the owner at the other end of the socket; the exit status is 0 only after it closed the connection."""
    phases = Phases(process_began_s())
    phases.end("imports")
    threading.excepthook = end_process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.setswitchinterval(messages.SWITCH_INTERVAL_S)
    connection = Connection(file_descriptor)
    start = messages.receive_in_engine(connection)
    assert isinstance(start, messages.Start), "the first message says what to serve"
    start_logging(start.settings.log_level, start.settings.log_format)
    outbox = Outbox(connection, start.settings.max_tokens_per_response)
    try:
        engine, ready = build_engine(start.settings, outbox, phases)
        signal.signal(signal.SIGTERM, lambda *_: engine.abort_all())
        keep_what_is_loaded()
        phases.end("engine")
        log.info("ready in %s", phases.line(), extra=phases.fields())
        outbox.put(ready)
        threading.Thread(target=read_orders, args=(connection, engine), name="reader", daemon=True).start()
        threading.Thread(target=report_life, args=(engine, outbox), name="life", daemon=True).start()
        engine.run()
    except Exception as error:  # the last stop of this process: say what happened, then end it
        is_config = isinstance(error, ConfigError)
        log.error("%s", error, exc_info=not is_config)
        outbox.put(messages.Fatal(f"{type(error).__name__}: {error}" if not is_config else str(error), is_config))
        outbox.close()
        return 1
    outbox.close()
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main(int(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # threads of torch and of the reader have nothing left to say
