"""Compiled programs on disk, so that each is compiled once per machine and not once per start.

An entry's name is a digest of everything that decides its content: source and headers, macros, flags, NVRTC. So an entry
is never changed, and an old one is never used for a new source. Entries are written aside and renamed; a lock makes other
processes wait for the one that compiles; a checksum finds entries that are cut off or damaged, which are made anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from kernels.compiler import FLAGS, Cubin, KernelResources, compile_program, compiler_version
from kernels.errors import BuildError
from kernels.program import Program
from kernels.sources import include_folders, sources_digest

FOLDER_VARIABLE = "NEMO_KERNEL_CACHE"
_MAGIC = b"nemo-kernel 1\n"
_logger = logging.getLogger(__name__)


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """`NEMO_KERNEL_CACHE` if it is set, else `nemo-triton/kernels` in the user's cache folder (XDG).

    >>> cache_folder({"XDG_CACHE_HOME": "/var/cache"})
    PosixPath('/var/cache/nemo-triton/kernels')
    """
    environment = os.environ if environment is None else environment
    if given := environment.get(FOLDER_VARIABLE):
        return Path(given)
    # A relative XDG_CACHE_HOME is to be ignored, says the XDG Base Directory Specification.
    given = environment.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path(environment.get("HOME") or "/") / ".cache"
    return base / "nemo-triton" / "kernels"


class CubinCache:
    """Compiled programs in a folder, shared by any number of processes and threads."""

    def __init__(self, folder: Path | None = None, compile_with: Callable[[Program], Cubin] = compile_program) -> None:
        self.folder = cache_folder() if folder is None else folder
        self._compile = compile_with

    def entry(self, program: Program) -> Path:
        """Where the program is or will be kept. BuildError if its source is not there."""
        parts = {
            "program": str(program),
            "sources": sources_digest(program.source, include_folders()),
            "flags": FLAGS,
            "compiler": compiler_version(),
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{program.name}-{digest[:32]}.cubin"

    def find(self, program: Program) -> Cubin | None:
        """The program if it is there whole; never compiles."""
        return _read(self.entry(program))

    def get(self, program: Program) -> Cubin:
        """The program, compiled now if it has to be. BuildError if it does not compile or cannot be kept."""
        path = self.entry(program)
        if (cubin := _read(path)) is not None:
            return cubin
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                # Another process may have compiled it while this one waited.
                if (cubin := _read(path)) is None:
                    _logger.info("compiling %s", program)
                    cubin = self._compile(program)
                    _write(path, cubin)
        except OSError as error:
            raise BuildError(
                f"compiled kernels cannot be kept in {self.folder} ({error.strerror}): "
                f"set {FOLDER_VARIABLE} to a folder that can be written"
            ) from error
        return cubin


def _read(path: Path) -> Cubin | None:
    """None if there is no entry or a damaged one."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BuildError(f"{path}: cannot read this compiled kernel ({error.strerror})") from error
    head = len(_MAGIC) + hashlib.sha256().digest_size
    body = content[head:]
    if content[:head] != _MAGIC + hashlib.sha256(body).digest():
        _logger.warning("%s is damaged: compiling it again", path)
        return None
    described, _, image = body.partition(b"\n")
    entry = json.loads(described)
    kernels = {name: KernelResources(**resources) for name, resources in entry["kernels"].items()}
    return Cubin(image, kernels, entry["log"])


def _write(path: Path, cubin: Cubin) -> None:
    kernels = {name: asdict(resources) for name, resources in cubin.kernels.items()}
    body = json.dumps({"kernels": kernels, "log": cubin.log}).encode() + b"\n" + cubin.image
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}.", delete=False) as aside:
        try:
            aside.write(_MAGIC + hashlib.sha256(body).digest() + body)
            aside.flush()
            os.fchmod(aside.fileno(), 0o644)
            os.replace(aside.name, path)
        except OSError:
            os.unlink(aside.name)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file, and removes it afterwards. A file system without locks costs a second compile at most."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            # The one who held it before may have removed the file, and a third may hold a new one of that name.
            if not _is_same_file(lock, path):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            return
        finally:
            os.close(lock)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
