from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.checkpoint import piece_reader
from backend.checkpoint.piece_reader import NUM_BUFFERS, read_pieces
from backend.checkpoint.tensor_files import StoredTensor
from backend.errors import ConfigError

CPU = torch.device("cpu")


def stored(path: Path, tensors: dict[str, torch.Tensor]) -> list[StoredTensor]:
    """The tensors written to `path` as plain bytes, one behind the other with a gap of a byte."""
    found, content = [], bytearray()
    for name, tensor in tensors.items():
        content += b"\xff"
        found.append(StoredTensor(name, path, len(content), tuple(tensor.shape), tensor.dtype))
        content += tensor.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    return found


def some_tensors(num: int, rows: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(rows, 5, generator=generator) for i in range(num)}


def joined(tensors: list[tuple[StoredTensor, int]]) -> dict[str, torch.Tensor]:
    rows: dict[str, list[torch.Tensor]] = {}
    for piece in read_pieces(tensors, CPU):
        pieces = rows.setdefault(piece.tensor.name, [])
        assert piece.first_row == sum(map(len, pieces)), "pieces come in order and without gaps"
        pieces.append(piece.rows.clone())
    return {name: torch.cat(pieces) for name, pieces in rows.items()}


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]),
    rows_together=st.integers(1, 8),
    piece_bytes=st.integers(1, 400),
)
def test_pieces_make_up_the_tensors(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    rows_together: int,
    piece_bytes: int,
) -> None:
    source = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    tensors = [(tensor, rows_together) for tensor in stored(tmp_path_factory.mktemp("pieces") / "file", source)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piece_reader, "PIECE_BYTES", piece_bytes)
        found = joined(tensors)
        for piece in read_pieces(tensors, CPU):
            num_bytes = piece.rows.numel() * piece.rows.itemsize
            assert num_bytes <= max(piece_bytes, rows_together * piece.rows[0].numel() * piece.rows.itemsize)
            assert piece.first_row % rows_together == 0
    assert list(found) == list(source)
    for name, tensor in source.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_threads_that_finish_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, chance, preadv = some_tensors(50), random.Random(0), os.preadv

    def slow(*arguments: Any) -> int:
        time.sleep(chance.random() / 200)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    found = joined([(tensor, 1) for tensor in stored(tmp_path / "file", source)])
    assert list(found) == list(source)
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, preadv = some_tensors(3), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, targets, offset: preadv(file, [targets[0][:11]], offset))
    found = joined([(tensor, 1) for tensor in stored(tmp_path / "file", source)])
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_never_further_ahead_than_there_are_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, preadv, reads, changed = some_tensors(40), os.preadv, [], threading.Condition()

    def counted(*arguments: Any) -> int:
        with changed:
            reads.append(arguments[2])
            changed.notify_all()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", counted)
    pieces = read_pieces([(tensor, 1) for tensor in stored(tmp_path / "file", source)], CPU)
    for num_taken in range(1, 41):
        kept = next(pieces)
        expected = min(40, num_taken + NUM_BUFFERS - 1)
        with changed:
            assert changed.wait_for(lambda: len(reads) >= expected, timeout=30), "it reads ahead"  # noqa: B023
        assert len(reads) == expected, "the buffer of the piece that is looked at is not read into"
        assert torch.equal(kept.rows, source[kept.tensor.name])


def test_a_file_that_ends_too_early_or_cannot_be_read(tmp_path: Path) -> None:
    tensors = [(tensor, 1) for tensor in stored(tmp_path / "file", some_tensors(30))]
    last = tensors[-1][0]
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(last.offset + 3)
    with pytest.raises(ConfigError, match=rf"file ends at byte {last.offset + 3}, in t29; download"):
        joined(tensors)
    (tmp_path / "file").unlink()
    with pytest.raises(ConfigError, match=r"file cannot be read: No such file"):
        joined(tensors)
    (tmp_path / "file").mkdir()
    with pytest.raises(ConfigError, match=r"file cannot be read: Is a directory"):
        joined(tensors)


def test_given_up_half_way(tmp_path: Path) -> None:
    tensors = [(tensor, 1) for tensor in stored(tmp_path / "file", some_tensors(30))]
    pieces = read_pieces(tensors, CPU)
    next(pieces)
    assert any(thread.name.startswith("weights") for thread in threading.enumerate())
    pieces.close()
    assert not any(thread.name.startswith("weights") for thread in threading.enumerate())
    open_files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert str(tmp_path / "file") not in open_files


def test_nothing_to_read() -> None:
    assert list(read_pieces([], CPU)) == []
