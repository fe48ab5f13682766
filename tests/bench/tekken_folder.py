"""Mistral NeMo's own Tekken vocabulary, which mistral-common ships, as a checkpoint folder holds it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.demo.make_tekken import SOURCE


@contextmanager
def tekken_folder() -> Iterator[Path]:
    """A temporary folder with a `tekken.json`."""
    with tempfile.TemporaryDirectory() as name:
        Path(name, "tekken.json").symlink_to(SOURCE)
        yield Path(name)
