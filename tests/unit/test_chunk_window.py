"""Chunks under way: the window is full at its bound, opens when postprocessing sees one, and does not stay shut for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.triton_adapter.chunk_window import MOST_CHUNKS, ChunkWindow, SeenChunks
from backend.triton_adapter.presence import RUN_DIR_VARIABLE


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    return tmp_path


def fill(window: ChunkWindow, now_s: float) -> list[int]:
    numbers = []
    while not window.is_full(now_s):
        numbers.append(window.next_number())
        assert len(numbers) <= MOST_CHUNKS
    return numbers


def test_full_at_the_bound_and_open_by_as_many_as_were_seen() -> None:
    window, seen = ChunkWindow(), SeenChunks()
    numbers = fill(window, 1.0)
    assert len(numbers) == MOST_CHUNKS
    assert window.is_full(1.5)
    seen.note(numbers[4])
    assert len(fill(window, 1.5)) == 5
    seen.note(window.next_number())
    assert len(fill(window, 1.5)) == MOST_CHUNKS


def test_chunks_that_never_arrive_are_given_up_after_a_second() -> None:
    window = ChunkWindow()
    fill(window, 1.0)
    assert window.is_full(1.0)
    assert window.is_full(1.9)
    assert len(fill(window, 2.1)) == MOST_CHUNKS
    assert window.is_full(3.0)
    assert not window.is_full(3.2)


def test_slow_postprocessing_is_not_taken_for_lost() -> None:
    window, seen = ChunkWindow(), SeenChunks()
    numbers = fill(window, 0.0)
    for now_s, number in enumerate(numbers, start=1):
        seen.note(number)
        assert not window.is_full(now_s - 0.1)
        window.next_number()
        assert window.is_full(now_s - 0.1)


def test_a_new_engine_goes_on_where_the_last_one_ended() -> None:
    first, seen = ChunkWindow(), SeenChunks()
    seen.note(fill(first, 1.0)[-1])
    second = ChunkWindow()
    assert len(fill(second, 1.0)) == MOST_CHUNKS


def test_numbers_start_again_behind_the_largest(run_dir: Path) -> None:
    (run_dir / "last_chunk_seen").write_bytes((2**31 - 3).to_bytes(4, "little"))
    window = ChunkWindow()
    assert [window.next_number() for _ in range(4)] == [2**31 - 2, 2**31 - 1, 0, 1]
    assert not window.is_full(1.0)
    assert len(fill(window, 1.0)) == MOST_CHUNKS - 4


@pytest.mark.parametrize("number", [0, 1, 2**30, 2**31 - 1])
def test_a_number_that_cannot_be_the_next_changes_nothing(number: int) -> None:
    """Made up by a client, or none at all."""
    window, seen = ChunkWindow(), SeenChunks()
    numbers = fill(window, 1.0)
    seen.note(numbers[1])
    assert len(fill(window, 1.0)) == 2
    seen.note(number)
    assert window.is_full(1.0)
    seen.note(numbers[2])
    assert len(fill(window, 1.0)) == 1


def test_a_number_that_was_not_sent_yet_holds_nothing_up() -> None:
    window, seen = ChunkWindow(), SeenChunks()
    fill(window, 1.0)
    seen.note(5000)
    assert not window.is_full(1.0)


def test_without_a_supervisor_there_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE)
    window = ChunkWindow()
    SeenChunks().note(7)
    for _ in range(2 * MOST_CHUNKS):
        assert not window.is_full(1.0)
        window.next_number()
