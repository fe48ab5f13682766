from __future__ import annotations

from pathlib import Path

import pytest

from kernels.errors import BuildError
from kernels.sources import include_folders, read_source, sources_digest


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_digest_changes_with_any_header_and_with_nothing_else(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a" / "op.cu", '#include "near.cuh"\n#include <cuda_bf16.h>\n  #  include "far/deep.cuh"\n'
    )
    near = write(tmp_path / "a" / "near.cuh", '#include "near.cuh"\n#include <built_in.h>\n')
    deep = write(tmp_path / "b" / "far" / "deep.cuh", "int depth;\n")
    write(tmp_path / "b" / "unrelated.cuh", "")
    folders = [tmp_path / "b"]
    seen = [sources_digest(source, folders)]
    for path, text in (
        (near, '#include "near.cuh"\n#include <built_in.h>\n// changed\n'),
        (deep, "int depth = 2;\n"),
        (source, '#include "near.cuh"\n#include "far/deep.cuh"\n'),
        # A header that was the compiler's own is now found.
        (tmp_path / "b" / "built_in.h", ""),
    ):
        write(path, text)
        seen.append(sources_digest(source, folders))
    assert len(set(seen)) == 5
    write(tmp_path / "b" / "unrelated.cuh", "// changed")
    assert sources_digest(source, folders) == seen[-1]


def test_digest_does_not_depend_on_where_the_project_is(tmp_path: Path) -> None:
    sources = [write(tmp_path / place / "op.cu", '#include "x.cuh"\n') for place in ("here", "there")]
    for source in sources:
        write(source.parent / "x.cuh", "int x;\n")
    assert len({sources_digest(source, []) for source in sources}) == 1


def test_cuda_headers_are_found() -> None:
    own, cuda = include_folders()
    assert own.name == "kernels"
    assert (cuda / "cuda_fp8.h").is_file()


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"gone.cu: cannot read the source \(No such file"):
        read_source(tmp_path / "gone.cu")
    with pytest.raises(BuildError, match=r"gone.cu: cannot read the source"):
        sources_digest(tmp_path / "gone.cu", [])
