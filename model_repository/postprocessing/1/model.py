"""Triton's entry of the model `postprocessing`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.triton_adapter.postprocessing import Postprocessing


class TritonPythonModel:
    """What the engine sends -> text; what it does is in backend/triton_adapter/postprocessing.py."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the vocabulary."""
        self._model = Postprocessing(Path(__file__).parents[2])

    def execute(self, requests: list[Any]) -> None:
        """Answer each response of the engine."""
        self._model.execute(requests)

    def finalize(self) -> None:
        """Say that the end is meant."""
        self._model.close()
