"""Triton's entry of the model `preprocessing`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.triton_adapter.preprocessing import Preprocessing


class TritonPythonModel:
    """Prompt -> token ids; what it does is in backend/triton_adapter/preprocessing.py."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer."""
        self._model = Preprocessing(Path(__file__).parents[2])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request."""
        return self._model.execute(requests)

    def finalize(self) -> None:
        """Say that the end is meant."""
        self._model.close()
