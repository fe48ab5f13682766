"""What gguf_file.py needs of a Hugging Face checkpoint, in forms that it can read with NumPy and the standard library alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer


def export_weights(checkpoint: Path, folder: Path) -> None:
    """Write weights.npz (FP32), config.json and tokenizer.json into `folder`; one safetensors file is expected."""
    weights = load_file(checkpoint / "model.safetensors")
    np.savez(folder / "weights.npz", **{name: tensor.float().numpy() for name, tensor in weights.items()})
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tokenizer = convert_tekken_tokenizer(str(checkpoint / "tekken.json")).backend_tokenizer
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
