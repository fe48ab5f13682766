"""What a checkpoint needs on a machine one does not have: `python -m backend.plan --gpu-memory 80GB --weights fp8 --kv fp8`.

Without `--checkpoint` it answers for Mistral NeMo 12B.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.model_config import ModelConfig, read_model_config
from backend.checkpoint.weights import weight_bytes
from backend.errors import ConfigError
from backend.runner.gathered_attention import gathered_page_bytes
from backend.runner.memory_plan import MemoryPlan, page_bytes, plan_memory, workspace_bytes

NEMO_12B = ModelConfig(
    layout="huggingface",
    num_layers=40,
    hidden_size=5120,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    vocab_size=131072,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
    source_dtype="bfloat16",
)
"""Source: config.json of mistralai/Mistral-Nemo-Instruct-2407."""

_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def weight_format(weights: str) -> WeightFormat:
    """What a GPU holds a model in when the setting `weight_dtype` is `weights`: under fp8 embedding and head stay BF16."""
    return WeightFormat(_DTYPES.get(weights, torch.bfloat16), has_fp8_linears=weights == "fp8")


def plan_machine(config: ModelConfig, memory_bytes: int, arguments: argparse.Namespace) -> MemoryPlan:
    """The plan for a device of `memory_bytes`; ConfigError with the numbers when the model does not fit."""
    return plan_memory(
        f"a device of {memory_bytes / 1e9:.1f} GB",
        int(memory_bytes * arguments.memory_fraction),
        weight_bytes(config, weight_format(arguments.weights)),
        workspace_bytes(config, arguments.max_step_tokens, arguments.max_num_seqs),
        page_bytes(config, _BYTES[arguments.kv]),
        kv_cache_tokens=0,
        most_tokens=None,
        gathered_page_bytes=gathered_page_bytes(config, _BYTES[arguments.kv]),
        max_model_len=arguments.max_model_len,
    )


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `80GB` or `141 GiB`.

    >>> parse_bytes("80GB"), parse_bytes("1.5 GiB")
    (80000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a number and a unit ({', '.join(_UNITS)}), got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; exit status 1 when the model does not fit."""
    parser = argparse.ArgumentParser(prog="python -m backend.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu-memory", type=parse_bytes, required=True, help="memory of the device, such as 80GB")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the sizes of Mistral NeMo 12B)")
    parser.add_argument("--weights", choices=_BYTES, default="bf16")
    parser.add_argument("--kv", choices=_BYTES, default="bf16")
    parser.add_argument("--memory-fraction", type=float, default=0.9, help="share of the memory to use")
    parser.add_argument("--max-step-tokens", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=131072)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    arguments = parser.parse_args(argv)
    try:
        config = NEMO_12B if arguments.checkpoint is None else read_model_config(arguments.checkpoint)
        plan = plan_machine(config, arguments.gpu_memory, arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    for name, value in plan.lines().items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
