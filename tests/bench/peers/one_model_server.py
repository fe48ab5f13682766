"""tritonserver with a repository of the one model alone, without this project's supervisor."""

from __future__ import annotations

import shutil
from pathlib import Path

from backend.installation import find_installation, find_libpython, lay_out_backends, server_environment
from tests.bench.peers.processes import PeerProcess
from tests.triton import live_server

_FOLDER = Path(__file__).parent
MODEL = "one_model"


class OneModelServer:
    """Serves `checkpoint` over gRPC as `one_model`; `settings` are this project's."""

    def __init__(self, checkpoint: Path, folder: Path, **settings: str) -> None:
        version = folder / "repository" / MODEL / "1"
        version.mkdir(parents=True)
        shutil.copy2(_FOLDER / "one_model.py", version / "model.py")
        shutil.copy2(_FOLDER / "one_model.pbtxt", version.parent / "config.pbtxt")
        installation = find_installation()
        self._http_port, grpc_port, metrics_port = live_server.free_ports(3)
        self.grpc_url = f"127.0.0.1:{grpc_port}"
        self._shared_memory = f"nemo_peer_{grpc_port}_"
        variables = {f"NEMO_{name.upper()}": value for name, value in settings.items()}
        environment = live_server.server_environment() | server_environment(installation, find_libpython())
        environment = {name: value for name, value in environment.items() if not name.startswith("NEMO_")}
        self._process = PeerProcess(
            [
                str(installation.server),
                f"--model-repository={folder / 'repository'}",
                f"--backend-directory={lay_out_backends(installation, folder)}",
                f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
                f"--http-port={self._http_port}",
                f"--grpc-port={grpc_port}",
                f"--metrics-port={metrics_port}",
                "--http-address=127.0.0.1",
                "--grpc-address=127.0.0.1",
                "--exit-timeout-secs=2",
                "--allow-gpu-metrics=false",
                "--pinned-memory-pool-byte-size=0",
            ],
            folder / "log.txt",
            environment | {"NEMO_CHECKPOINT": str(checkpoint)} | variables,
        )
        self.pids = self._process.pids

    def wait_until_ready(self) -> None:
        """Return once the model serves."""

        def is_ready() -> bool:
            assert self._process.process.poll() is None, self._process.log_path.read_text(errors="replace")
            try:
                return live_server.http_get(self._http_port, f"/v2/models/{MODEL}/ready")[0] == 200
            except OSError:
                return False

        live_server.wait_until(is_ready, 120.0, lambda: self._process.log_path.read_text(errors="replace"))

    def end(self) -> None:
        """End the server and remove its shared memory."""
        self._process.end()
        for region in Path("/dev/shm").glob(f"{self._shared_memory}*"):
            region.unlink(missing_ok=True)
