"""What FP8 and BF16 cost in quality, on the demo checkpoint: logits and answers against FP32.

    python -m tests.bench.bench_quality [--questions 0]

Questions in phrasings the demo was not trained on and behind system prompts, then the right answer token by token through the
PyTorch runner, so that decode steps read the KV pages. For each token: the error of the logits over their spread, the
divergence of the distribution, whether the best id is FP32's. An answer is right when greedy decoding gives it exactly.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backend.engine.plan import PAGE_TOKENS
from backend.runner.torch_runner import TorchRunner
from tests.bench.conditions import conditions, write_results
from tests.bench.tables import quality_table
from tests.demo.conversation import EOS_ID, ChatTokens
from tests.demo.evaluate import CHECKPOINT, Case, all_cases
from tests.demo.questions import read_data
from tests.quantised_checkpoints import SCHEMES, quantise_checkpoint
from tests.unit.runner.driver import Driver, Script

_ROWS_PER_STEP = 16
_MAX_TOKENS = 512
_KINDS = ("held_out", "system_prompt")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "FP32": {"weight_dtype": "fp32"},
    "BF16": {"weight_dtype": "bf16"},
    "FP8 weights": {"weight_dtype": "fp8"},
    "FP8 weights and head": {"weight_dtype": "fp8", "head_dtype": "fp8"},
    "FP8 KV": {"weight_dtype": "fp32", "kv_dtype": "fp8"},
    "FP8 weights and KV": {"weight_dtype": "fp8", "kv_dtype": "fp8"},
}
"""Settings of the runner by the name of their row; the first is what the others are compared with."""


def answer_logits(folder: Path, cases: Sequence[Case], settings: dict[str, Any]) -> list[torch.Tensor]:
    """For each case the logits [answer tokens and its end, V] that the right answer before them leads to."""
    pages_per_case = _MAX_TOKENS // PAGE_TOKENS
    runner = TorchRunner(
        folder,
        num_pages=_ROWS_PER_STEP * pages_per_case,
        max_num_seqs=_ROWS_PER_STEP,
        max_model_len=_MAX_TOKENS,
        **settings,
    )
    tokens, driver, kept = ChatTokens(folder / "tekken.json"), Driver(runner), list[torch.Tensor]()
    for first in range(0, len(cases), _ROWS_PER_STEP):
        scripts = []
        for slot, case in enumerate(cases[first : first + _ROWS_PER_STEP]):
            answer = tokens.encode(case.expected)
            scripts.append(
                Script(
                    prompt=(*case.prompt, *answer),
                    chunks=(len(case.prompt), *(1,) * len(answer)),
                    slot=slot,
                    pages=tuple(range(slot * pages_per_case, (slot + 1) * pages_per_case)),
                    is_every_chunk_sampled=True,
                )
            )
        driver.run(scripts)
        kept += [torch.stack(script.logits) for script in scripts]
        print(f"\r  {len(kept)} of {len(cases)} questions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    runner.close()
    return kept


def compare(
    folder: Path, cases: Sequence[Case], actual: list[torch.Tensor], expected: list[torch.Tensor]
) -> dict[str, Any]:
    """One row of the table."""
    tokens = ChatTokens(folder / "tekken.json")
    got, wanted = torch.cat(actual), torch.cat(expected)
    right = [
        logits.argmax(dim=1).tolist() == [*tokens.encode(case.expected), EOS_ID]
        for case, logits in zip(cases, actual, strict=True)
    ]
    log_probs, expected_log_probs = got.log_softmax(dim=1), wanted.log_softmax(dim=1)
    divergence = (expected_log_probs.exp() * (expected_log_probs - log_probs)).sum(dim=1)
    return {
        "logits_error_percent": 100 * ((got - wanted).square().mean() / wanted.var()).sqrt().item(),
        "mean_kl_nats": divergence.mean().item(),
        "same_best_id_percent": 100 * (got.argmax(dim=1) == wanted.argmax(dim=1)).double().mean().item(),
        "num_right": sum(right),
        "num_questions": len(cases),
        "num_tokens": len(got),
    }


def measure(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """All rows: the settings of CONFIGURATIONS on the shipped checkpoint, then FP8 checkpoints of each kind as they are."""
    sources = {name: (CHECKPOINT, settings) for name, settings in CONFIGURATIONS.items()}
    for name, scheme in SCHEMES.items():
        if (
            not scheme.has_input_scales and not scheme.kv_scale_names
        ):  # those are made for the tests, not measured on data
            quantise_checkpoint(CHECKPOINT, folder / name.replace(" ", "-"), scheme)
            sources[f"checkpoint: {name}"] = (folder / name.replace(" ", "-"), {})
    cells, expected = [], list[torch.Tensor]()
    for name, (checkpoint, settings) in sources.items():
        print(name, file=sys.stderr)
        actual = answer_logits(checkpoint, cases, settings)
        expected = expected or actual
        cells.append({"held": name} | compare(checkpoint, cases, actual, expected))
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_quality", allow_abbrev=False)
    parser.add_argument("--questions", type=int, default=0, help="only the first ones; 0: all")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions("tests.bench.bench_quality", argv if argv is not None else sys.argv[1:])
    tokens = ChatTokens(CHECKPOINT / "tekken.json")
    cases = [case for case in all_cases(read_data(), tokens) if case.kind in _KINDS]
    cases = cases[: arguments.questions or len(cases)]
    with tempfile.TemporaryDirectory() as folder:
        results = about | {"cells": measure(cases, Path(folder))}
    print(quality_table(results))
    if not arguments.no_results:
        write_results("quality", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
