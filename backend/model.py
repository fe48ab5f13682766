"""Triton's entry of the python-based backend `nemo`: found as `<backend-directory>/nemo/model.py`."""

from __future__ import annotations

import json
from typing import Any

from backend.triton_adapter.mistral_nemo import MistralNemo


class TritonPythonModel:
    """The model `mistral_nemo`; what it does is in backend/triton_adapter/mistral_nemo.py."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine and wait until it serves."""
        self._model = MistralNemo(json.loads(args["model_config"]))

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the engine; answers come later, from its own thread."""
        self._model.execute(requests)

    def finalize(self) -> None:
        """End the engine."""
        self._model.close()
