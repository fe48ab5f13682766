"""Damaged files of a checkpoint: each is loaded or refused by an error of the project, soon, and leaves nothing open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.checkpoint.vocabulary import read_vocabulary
from tests.checkpoints import make_checkpoint
from tests.fuzz.cases import cases, check_damaged
from tests.fuzz.checkpoint_parsers import SIZES, checkpoint_parsers, load
from tests.fuzz.parser import Parser
from tests.fuzz.watch import nothing_left_open, refusal_of

FILES = (
    *("config.json", "config.json, fp8", "config.json, compressed-tensors", "params.json", "hf_quant_config.json"),
    *("model.safetensors", "model.safetensors, fp8", "model.safetensors, fp8 block", "consolidated.safetensors"),
    *("model.safetensors.index.json", "tekken.json", "tokenizer.json"),
)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    parsers = checkpoint_parsers(tmp_path_factory.mktemp("checkpoints"))
    assert tuple(parsers) == FILES
    return parsers


@pytest.mark.parametrize("name", FILES)
def test_undamaged_files_are_taken(parsers: dict[str, Parser], name: str) -> None:
    for sample in parsers[name].samples:
        assert refusal_of(parsers[name].parse, sample) is None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_taken_or_refused(parsers: dict[str, Parser], name: str) -> None:
    check_damaged(name, parsers[name], cases(small=20, full=1000))


def replace_by_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def replace_by_a_circle(path: Path) -> None:
    other = path.with_name("other")
    path.unlink()
    other.symlink_to(path.name)
    path.symlink_to(other.name)


def replace_by_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_endless(path: Path) -> None:
    """A file with a hole of a terabyte at its end."""
    os.truncate(path, 2**40)


TRICKS = (
    replace_by_itself,
    replace_by_a_circle,
    replace_by_a_device,
    replace_by_a_pipe,
    replace_by_a_folder,
    make_endless,
)


@pytest.mark.parametrize(
    "file_name", ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("trick", TRICKS)
def test_files_that_are_no_files(tmp_path: Path, trick: Callable[[Path], None], file_name: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_shards=2, **SIZES)
    trick(folder / file_name)
    with nothing_left_open():
        is_refused = refusal_of(lambda _: load(folder), b"") is not None
    # Without the index the shards are found by their numbers.
    assert is_refused == (file_name != "model.safetensors.index.json" or trick is make_endless)


@pytest.mark.parametrize("file_name", ["tekken.json", "tokenizer.json"])
@pytest.mark.parametrize("trick", TRICKS)
def test_tokenizers_that_are_no_files(tmp_path: Path, trick: Callable[[Path], None], file_name: str) -> None:
    path = tmp_path / file_name
    path.write_text("{}")
    trick(path)
    with nothing_left_open():
        assert refusal_of(lambda _: read_vocabulary(tmp_path), b"") is not None


def test_a_checkpoint_of_links_into_a_store_is_taken(tmp_path: Path) -> None:
    """So the hub's client lays folders out."""
    store = make_checkpoint(tmp_path / "store", num_shards=2, **SIZES)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).symlink_to(path)
    assert refusal_of(lambda _: load(folder), b"") is None
