"""A checkpoint folder for the engine process, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def tekken_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a Tekken vocabulary of 1,400 ids."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), num_layers=1, hidden_size=64, vocab_size=1400, has_tekken=True
    )
