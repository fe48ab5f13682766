from __future__ import annotations

import logging
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.compiler import Cubin, KernelResources
from kernels.cubin_cache import CubinCache, cache_folder
from kernels.errors import BuildError
from kernels.program import Program

COPY = Program(Path(__file__).parent / "copy.cu", (("E", 32),))
CUBIN = Cubin(b"image\nwith a line", {"copy": KernelResources(24, 0, 0, 128)}, "a log\nof two lines")


class CountingCompiler:
    def __init__(self) -> None:
        self.compiled: list[Program] = []

    def __call__(self, program: Program) -> Cubin:
        self.compiled.append(program)
        return CUBIN


@pytest.fixture
def compiler() -> CountingCompiler:
    return CountingCompiler()


@pytest.fixture
def cache(tmp_path: Path, compiler: CountingCompiler) -> CubinCache:
    return CubinCache(tmp_path / "deep" / "cache", compiler)


def test_program_is_compiled_once_and_read_whole(cache: CubinCache, compiler: CountingCompiler) -> None:
    assert cache.find(COPY) is None
    assert cache.get(COPY) == CUBIN
    assert cache.find(COPY) == CUBIN
    assert CubinCache(cache.folder, compiler).get(COPY) == CUBIN
    assert compiler.compiled == [COPY]
    # Neither locks nor half-written files stay.
    assert [path.suffix for path in cache.folder.iterdir()] == [".cubin"]


def test_key_holds_macros_source_headers_flags_and_compiler(
    cache: CubinCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, header = tmp_path / "op.cu", tmp_path / "op.cuh"
    source.write_text('#include "op.cuh"\n')
    header.write_text("")
    program = Program(source)
    entries = [cache.entry(program), cache.entry(replace(program, definitions=(("E", 8),)))]
    header.write_text("// other")
    entries.append(cache.entry(program))
    source.write_text('#include "op.cuh"\n// other')
    entries.append(cache.entry(program))
    monkeypatch.setattr("kernels.cubin_cache.compiler_version", lambda: "another")
    entries.append(cache.entry(program))
    monkeypatch.setattr("kernels.cubin_cache.FLAGS", ("--other",))
    entries.append(cache.entry(program))
    assert len(set(entries)) == len(entries)
    assert cache.entry(program) == entries[-1]


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "appended", "other version"])
def test_damaged_entry_is_compiled_again(
    cache: CubinCache, compiler: CountingCompiler, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.get(COPY)
    entry = cache.entry(COPY)
    content = entry.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    damaged = {
        "empty": b"",
        "cut": content[:-1],
        "changed": flipped,
        "appended": content + b"x",
        "other version": content.replace(b"nemo-kernel 1", b"nemo-kernel 0"),
    }[damage]
    entry.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert cache.get(COPY) == CUBIN
    assert f"{entry} is damaged: compiling it again" in caplog.text
    assert len(compiler.compiled) == 2
    assert entry.read_bytes() == content


def test_failed_compilation_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    errors = [BuildError("op does not compile")]

    def compile_or_fail(_: Program) -> Cubin:
        if errors:
            raise errors.pop()
        return CUBIN

    cache = CubinCache(tmp_path, compile_or_fail)
    with pytest.raises(BuildError, match="op does not compile"):
        cache.get(COPY)
    assert list(tmp_path.iterdir()) == []
    assert cache.get(COPY) == CUBIN


def test_threads_wait_for_the_one_that_compiles(cache: CubinCache, compiler: CountingCompiler) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(cache.get, [COPY] * 32)) == [CUBIN] * 32
    assert compiler.compiled == [COPY]


def test_processes_wait_for_the_one_that_compiles(tmp_path: Path) -> None:
    """Each process says so on its output when it compiles, and waits there until all have begun."""
    session = f"""
import pathlib, sys, time
from kernels.compiler import Cubin
from kernels.cubin_cache import CubinCache
from kernels.program import Program
folder = pathlib.Path({str(tmp_path)!r})
def compile_slowly(program):
    print("compiled")
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.begun"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    return Cubin(b"image", {{}}, "")
(folder / (sys.argv[1] + ".begun")).touch()
cache = CubinCache(folder / "cache", compile_slowly)
assert cache.get(Program(pathlib.Path({str(COPY.source)!r}), (("E", 32),))).image == b"image"
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", session, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(outputs) == ["", "", "compiled\n"]


def test_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path, compiler: CountingCompiler) -> None:
    file = tmp_path / "file"
    file.touch()
    cache = CubinCache(file / "cache", compiler)
    expected = rf"compiled kernels cannot be kept in {file}/cache \(.*\): set NEMO_KERNEL_CACHE to a folder that can be written"
    with pytest.raises(BuildError, match=expected):
        cache.get(COPY)


def test_full_disk_is_named_and_leaves_nothing_half_written(cache: CubinCache, compiler: CountingCompiler) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # as if 20 bytes were free
    try:
        with pytest.raises(
            BuildError, match=r"compiled kernels cannot be kept in .* \(File too large\): set NEMO_KERNEL"
        ):
            cache.get(COPY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache.folder.iterdir()) == []
    assert cache.get(COPY) == CUBIN
    assert len(compiler.compiled) == 2


def test_where_compiled_kernels_are_kept() -> None:
    home = {"HOME": "/home/user"}
    assert cache_folder(home) == Path("/home/user/.cache/nemo-triton/kernels")
    assert cache_folder({**home, "XDG_CACHE_HOME": "/cache"}) == Path("/cache/nemo-triton/kernels")
    assert cache_folder({**home, "XDG_CACHE_HOME": "relative"}) == Path("/home/user/.cache/nemo-triton/kernels")
    assert cache_folder({**home, "XDG_CACHE_HOME": "/cache", "NEMO_KERNEL_CACHE": "/own"}) == Path("/own")
