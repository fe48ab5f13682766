"""The image that tests/deploy/build_image.sh made, run as a container is: namespaces of its own, user 1000, a read-only root."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

from tests.deploy.helm import PROJECT
from tests.triton.live_server import LiveServer, wait_until

IMAGE = PROJECT / "build" / "image"
ROOT = IMAGE / "root"

# What a container runtime does. Shared memory is as large as asked for; everything else that can be written to is /tmp.
_ENTER = """
set -eu
root=$1 shared=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/dev"
for node in null zero random urandom; do touch "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"; done
mkdir "$root/dev/shm"
mount -t tmpfs -o "mode=1777,size=$shared" tmpfs "$root/dev/shm"
mount -o remount,ro,bind "$root"
exec chroot --userspec=1000:1000 "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$@"
"""


def image_config() -> dict[str, Any]:
    """The image's configuration: user, entrypoint, labels, environment."""
    config: dict[str, Any] = json.loads((IMAGE / "image.json").read_text())["Docker"]["config"]
    return config


def image_environment() -> dict[str, str]:
    return dict(each.split("=", 1) for each in image_config()["Env"])


def run_command(*arguments: str, shared_memory: str = "256m", **variables: str) -> list[str]:
    """The command line that runs the entrypoint with `arguments`; process 1 inside is what the image says."""
    config = image_config()
    environment = [f"{key}={value}" for key, value in (image_environment() | variables).items()]
    return [
        *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
        *("sh", "-c", _ENTER, "enter", str(ROOT), shared_memory, config["WorkingDir"]),
        *("env", "-i", *environment, *config["Entrypoint"], *arguments),
    ]


def run(*arguments: str, shared_memory: str = "256m", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one command of the image to its end."""
    command = run_command(*arguments, shared_memory=shared_memory, **variables)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class ImageServer(LiveServer):
    """`serve` in the image, on its demo checkpoint; `start` and the rest as LiveServer."""

    def __init__(self, folder: Path, *, grace_s: int) -> None:
        super().__init__(Path("/nowhere"), folder, has_gateway=True)
        self._command = run_command(
            *image_config()["Cmd"],
            HTTP_PORT=str(self.http_port),
            GRPC_PORT=str(self.grpc_port),
            METRICS_PORT=str(self.metrics_port),
            NIM_SERVER_PORT=str(self.openai_port),
            NIM_SERVED_MODEL_NAME="nemo",
            NIM_JSONL_LOGGING="1",
            GRACE_S=str(grace_s),
            NEMO_NUM_THREADS="1",
            LIVE_TEST_MARK=self._mark,
        )

    def wait_until_ready(self, timeout_s: float = 120.0) -> LiveServer:
        def is_ready() -> bool:
            assert self.process.poll() is None, f"{shlex.join(self._command)}\n{self.log()}"
            return self.is_ready()

        wait_until(is_ready, timeout_s, self.log)
        return self

    def init_pid(self) -> int:
        """Process 1 of the container, as it is called outside."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def run_folders(self) -> list[Path]:
        return list((Path(f"/proc/{self.init_pid()}/root/tmp")).glob("nemo-*"))

    def zombies(self) -> list[int]:
        """Processes of the container that nobody has reaped."""
        namespace = Path(f"/proc/{self.init_pid()}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                is_inside = entry.name.isdecimal() and (entry / "ns" / "pid").readlink() == namespace
                if is_inside and (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    found.append(int(entry.name))
            except OSError:
                continue
        return found
