"""llama.cpp's own HTTP server, out of the wheel `xllamacpp`; executed by the Python of .venv-peers.

    .venv-peers/bin/python tests/bench/peers/llama_server.py MODEL.gguf NUM_SLOTS TOKENS_PER_SLOT NUM_THREADS

Prints its address when it serves, and serves until SIGTERM.
"""

from __future__ import annotations

import signal
import sys

from xllamacpp import CommonParams, Server


def main(model: str, num_slots: int, tokens_per_slot: int, num_threads: int) -> None:
    """Serve on a free port of the loopback interface."""
    params = CommonParams()
    params.model.path = model
    params.port = 0
    params.n_parallel = num_slots
    params.n_ctx = num_slots * tokens_per_slot
    params.n_batch = params.n_ubatch = 512
    params.cont_batching = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    params.n_threads_http = num_slots + 4
    params.n_gpu_layers = 0
    params.warmup = True
    server = Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main(sys.argv[1], *map(int, sys.argv[2:5]))
