"""Finds the Triton server on this machine and lays out what it needs to run our models.

The server is /opt/tritonserver (NGC's image) or comes out of the `nvidia-pytriton` wheel. Its Python stub ignores PYTHONPATH: it
takes packages from the first `python3` on PATH and libpython from LD_LIBRARY_PATH, so both are set here, from the Python
that runs this file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from backend.errors import ConfigError

_IMAGE = Path("/opt/tritonserver")
_STUB = "triton_python_backend_stub"
PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Installation:
    """A Triton server: its binary, its Python backend's files, and folders with libraries it needs."""

    server: Path
    python_backend: Path
    stub: Path
    library_folders: tuple[Path, ...]
    source: str


def find_installation() -> Installation:
    """The server of the image if there is one, else that of the wheel; ConfigError with the remedy when there is none."""
    if (_IMAGE / "bin" / "tritonserver").exists():
        python_backend = _IMAGE / "backends" / "python"
        return Installation(
            _IMAGE / "bin" / "tritonserver", python_backend, python_backend / _STUB, (_IMAGE / "lib",), str(_IMAGE)
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"no Triton server: neither {_IMAGE} nor the package nvidia-pytriton exists for {sys.executable}; "
            "run `make serve`, which installs it into .venv"
        )
    package = Path(spec.submodule_search_locations[0])
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / _STUB
    if not stub.exists():
        raise ConfigError(
            f"the server of nvidia-pytriton has no stub for Python {version}; use Python 3.10, 3.11 or 3.12"
        )
    return Installation(
        root / "bin" / "tritonserver",
        root / "backends" / "python",
        stub,
        (package.parent / "nvidia_pytriton.libs",),
        "nvidia-pytriton",
    )


def find_libpython() -> Path:
    """The folder of the libpython of this very build; one of another build breaks C modules late."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not name.startswith("libpython") or not name.endswith((".so.1.0", ".so")):
        name = f"libpython{version}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    for candidate in (folder, folder / (sysconfig.get_config_var("MULTIARCH") or "")):
        if (candidate / name).exists():
            return candidate
    try:
        ctypes.CDLL(name)
    except OSError:
        raise ConfigError(
            f"{name} was not found in {folder}; Triton's Python stub needs it. On Debian and Ubuntu: "
            f"apt-get install libpython{version}; for a Python built from source: configure it with --enable-shared"
        ) from None
    return folder


def lay_out_backends(installation: Installation, run_folder: Path) -> Path:
    """Make the backend directory: `python` with the stub beside its library, and our python-based backend `nemo`.

    Files are copied, since the server refuses links that lead out of its backend directory. `nemo` holds backend/model.py
    alone, because the stub puts that folder on sys.path.
    """
    folder = run_folder / "backends"
    python_backend = folder / "python"
    python_backend.mkdir(parents=True)
    for file in (*installation.python_backend.iterdir(), installation.stub):
        target = python_backend / file.name
        if file.is_file() and not target.exists():
            shutil.copy2(file, target)
    nemo = folder / "nemo"
    nemo.mkdir()
    shutil.copy2(PROJECT / "backend" / "model.py", nemo)
    return folder


def server_environment(installation: Installation, libpython: Path) -> dict[str, str]:
    """This process's environment with PATH and LD_LIBRARY_PATH as the stub needs them."""
    environment = dict(os.environ)
    libraries = [str(libpython), *map(str, installation.library_folders), environment.get("LD_LIBRARY_PATH", "")]
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    environment.pop("PYTHONHOME", None)
    return environment


def check_machine() -> None:
    """Refuse what the server cannot run on."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(f"the Triton server runs on Linux x86_64, not on {sys.platform} {platform.machine()}")
