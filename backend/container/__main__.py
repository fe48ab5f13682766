"""The commands of the container: `python -m backend.container serve | check | plan | download | bench | ask | health`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from backend.container import checks
from backend.container.environment import HUB_PREFIX, ContainerEnvironment, read_environment
from backend.container.gpu import Gpu, find_gpus
from backend.errors import ConfigError
from backend.installation import PROJECT
from backend.logs import start_logging
from backend.serve import DEMO_CHECKPOINT
from backend.serve import parse_arguments as serve_arguments
from backend.server_api import ServerApi
from backend.settings import Settings, read_model_parameters

log = logging.getLogger("nemo.container")
PREBUILT_KERNELS = Path("/opt/nemo/kernels")
"""Where docker/Dockerfile compiles the kernels to."""


def serve(container: ContainerEnvironment, arguments: list[str]) -> int:
    """Check everything, then become the supervisor: the process id stays, so the signals reach it."""
    if container.source.startswith(HUB_PREFIX):
        _download(container, container.source)
    if check(container, []):
        return 1
    _copy_prebuilt_kernels()
    checkpoint = str(container.checkpoint or DEMO_CHECKPOINT)
    return _become("backend.serve", ["--question", "", "--checkpoint", checkpoint, *container.options, *arguments])


def check(container: ContainerEnvironment, arguments: list[str]) -> int:
    """Look at everything that `serve` needs."""
    if arguments:
        raise ConfigError(f"check takes no arguments, got {arguments}")
    checkpoint = container.checkpoint or DEMO_CHECKPOINT
    gpus = find_gpus()
    cuda_version = checks.torch_cuda_version()
    findings = [
        *checks.check_gpu(gpus, is_required=container.requires_gpu, cuda_version=cuda_version),
        *checks.check_checkpoint(checkpoint),
        *checks.check_shared_memory(),
        *checks.check_temporary_files(),
    ]
    if not any(finding.is_fatal for finding in findings if finding.what == "checkpoint"):
        findings += checks.check_memory(checkpoint, _settings(str(checkpoint)), gpus)
    return 0 if checks.report(findings) else 1


def plan_here(container: ContainerEnvironment, arguments: list[str]) -> int:
    """`backend.plan`, for this GPU and this checkpoint unless others are named."""
    from backend import plan  # brings torch

    given = list(arguments)
    gpus: list[Gpu] = [] if "--gpu-memory" in given else find_gpus()
    if gpus:
        given += ["--gpu-memory", f"{gpus[0].total_bytes}B"]
    if "--checkpoint" not in given and container.checkpoint is not None and container.checkpoint.exists():
        given += ["--checkpoint", str(container.checkpoint)]
    return plan.main(given)


def download(container: ContainerEnvironment, arguments: list[str]) -> int:
    """Fetch the named model, or that of NIM_MODEL_PATH."""
    if len(arguments) > 1:
        raise ConfigError(f"download takes one hf://ORGANISATION/NAME[@REVISION], got {arguments}")
    source = arguments[0] if arguments else container.source
    if not source.startswith(HUB_PREFIX):
        raise ConfigError(
            f"download needs hf://ORGANISATION/NAME[@REVISION], or NIM_MODEL_PATH with one, got {source!r}"
        )
    _download(container, source)
    return 0


def bench(container: ContainerEnvironment, arguments: list[str]) -> int:
    """The load generator."""
    return _become("client.load", arguments)


def ask(container: ContainerEnvironment, arguments: list[str]) -> int:
    """One question to a server."""
    return _become("client", arguments)


def health(container: ContainerEnvironment, arguments: list[str]) -> int:
    """Whether the server on this machine is ready: the image's HEALTHCHECK."""
    port = serve_arguments([*container.options, *arguments]).http_port
    return 0 if ServerApi(port, 0, "").is_ready("ensemble") else 1


COMMANDS: dict[str, Callable[[ContainerEnvironment, list[str]], int]] = {
    "serve": serve,
    "check": check,
    "plan": plan_here,
    "download": download,
    "bench": bench,
    "ask": ask,
    "health": health,
}


def main(argv: Sequence[str]) -> int:
    """Run one command; 2 for one that does not exist, 1 when something is wrong."""
    name, arguments = (argv[0], list(argv[1:])) if argv else ("serve", [])
    if name not in COMMANDS:
        print(f"no such command: {name}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    start_logging("info", os.environ.get("NEMO_LOG_FORMAT", "text"))
    try:
        container = read_environment(os.environ)
        os.environ.update(container.variables)
        start_logging(os.environ.get("NEMO_LOG_LEVEL", "info"), os.environ.get("NEMO_LOG_FORMAT", "text"))
        return COMMANDS[name](container, arguments)
    except ConfigError as error:
        log.error("%s", error)
        return 1


def _download(container: ContainerEnvironment, source: str) -> None:
    from backend.container.download import download as fetch  # half a second that the other commands need not wait

    fetch(source, container.store)


def _copy_prebuilt_kernels() -> None:
    """Start the cache of compiled kernels (a folder that can be written to, for other shapes) with those of the image."""
    cache = os.environ.get("NEMO_KERNEL_CACHE")
    if cache and PREBUILT_KERNELS.is_dir():
        shutil.copytree(PREBUILT_KERNELS, cache, dirs_exist_ok=True, copy_function=shutil.copyfile)


def _settings(checkpoint: str) -> Settings:
    parameters = read_model_parameters(PROJECT / "model_repository" / "mistral_nemo" / "config.pbtxt")
    return Settings.load(parameters, os.environ | {"NEMO_CHECKPOINT": checkpoint})


def _become(module: str, arguments: list[str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(PROJECT)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
