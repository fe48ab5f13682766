"""`make eval`: a checkpoint's scores through the running server, in each precision, beside the published ones.

    python -m tests.evaluation [--checkpoint FOLDER] [--tasks mmlu,hellaswag,winogrande,triviaqa,humaneval,needle,log_probs]
        [--precisions bf16,fp8,fp8-kv] [--limit 100] [--json FILE]

For each precision a server is started with its gateway, everything is asked of it, and it is stopped. Without a checkpoint:
the demo's, with tasks made of its own questions; that result is kept in tests/bench/results/evaluation.json. lm-eval fetches
the data of its tasks itself. humaneval executes what the model writes: run it where that may be done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client import Client
from tests.bench.conditions import PROJECT, conditions, write_results
from tests.evaluation.demo_tasks import write_demo_tasks
from tests.evaluation.long_context import (
    Prompts,
    ask_behind_text,
    by_position,
    find_needles,
    log_probs,
    reference_log_probs,
)
from tests.evaluation.published import DEMO_TASKS, TASKS
from tests.evaluation.report import report
from tests.triton.live_server import LiveServer

DEMO = PROJECT / "tests" / "demo" / "checkpoint"
MODEL = "mistral-nemo"
PRECISIONS: dict[str, dict[str, str]] = {
    "bf16": {"weight_dtype": "bf16", "kv_dtype": "bf16"},
    "fp8": {"weight_dtype": "fp8", "kv_dtype": "bf16"},
    "fp8-kv": {"weight_dtype": "fp8", "kv_dtype": "fp8"},
}
"""Settings of the server by the name of a precision; `fp8-kv` has FP8 weights as well as FP8 KV pages."""
LONG_CONTEXT = ("needle", "behind_text", "log_probs")
_READY_TIMEOUT_S = 1800.0
_NUM_QUESTIONS = 20


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"  {text}", file=sys.stderr, flush=True)


def lm_eval(python: Path, server: LiveServer, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What lm-eval finds for those of the tasks that are its own; CalledProcessError when it fails."""
    names = [name for name in options.tasks if name in TASKS]
    if not names:
        return {}
    folder.mkdir()
    write_demo_tasks(folder)
    output = folder / "outcomes.json"
    job = {
        "url": f"http://127.0.0.1:{server.openai_port}",
        "model": MODEL,
        "bos_id": options.prompts.tokenizer.bos_id,
        "max_length": options.max_tokens,
        "num_concurrent": options.num_concurrent,
        "limit": options.limit,
        "tasks": [
            {key: getattr(TASKS[name], key) for key in ("name", "metric", "num_fewshot", "runs_code")} for name in names
        ],
        "task_folder": str(Path(__file__).with_name("tasks")),
        "output": str(output),
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"OPENAI_API_KEY": "none", "TOKENIZERS_PARALLELISM": "false"}
    if any(TASKS[name].runs_code for name in names):
        environment["HF_ALLOW_CODE_EVAL"] = "1"
    if all(name in DEMO_TASKS for name in names):
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    script = Path(__file__).with_name("run_lm_eval.py")
    command = [str(python.absolute()), str(script), str(folder / "job.json")]
    subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=True)
    outcomes: dict[str, Any] = json.loads(output.read_text())
    return outcomes


def measure(precision: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that is asked for, of a server in one precision; sample by sample where lm-eval has samples."""
    say(f"{precision}: starting")
    settings: dict[str, Any] = PRECISIONS[precision] | {"max_model_len": str(options.max_tokens)}
    server = LiveServer(options.checkpoint, folder / "server", has_gateway=True, **settings)
    run: dict[str, Any] = {"precision": precision}
    try:
        server.start().wait_until_ready(_READY_TIMEOUT_S)
        server.wait_until_gateway_ready()
        run["scores"] = lm_eval(options.lm_eval_python, server, options, folder / "lm_eval")
        with Client(server.grpc_url) as client:
            if "needle" in options.tasks:
                run["needle"] = find_needles(client, options.prompts, options.max_tokens, say)
            if "behind_text" in options.tasks:
                run["behind_text"] = ask_behind_text(client, options.prompts, options.max_tokens, _NUM_QUESTIONS, say)
            if "log_probs" in options.tasks:
                values = log_probs(client, options.prompts.text(options.max_tokens))
                run["log_probs"] = list(by_position(values, options.reference))
        server.stop()
    finally:
        server.kill_everything()
    return run


def compare_samples(runs: Sequence[dict[str, Any]]) -> None:
    """Replace the samples of each score by their number and how many differ from those of the first run."""
    first = {name: score["samples"] for name, score in runs[0]["scores"].items()}
    for run in runs:
        for name, score in run["scores"].items():
            samples = score.pop("samples")
            score["num_samples"] = len(samples)
            changes = [_verdict(a) != _verdict(b) for a, b in zip(samples, first[name], strict=True)]
            score["num_changed"] = sum(changes)
            distances = [d for a, b in zip(samples, first[name], strict=True) for d in _distances(a, b)]
            score["mean_log_prob_distance_nats"] = sum(distances) / len(distances) if distances else None


def _verdict(sample: dict[str, Any]) -> Any:
    """What a sample says: the likeliest choice, or the text."""
    responses = sample["responses"]
    if all(isinstance(each, list) and len(each) == 2 for each in responses):
        values = [float(each[0]) for each in responses]
        return values.index(max(values))
    return responses


def _distances(a: dict[str, Any], b: dict[str, Any]) -> list[float]:
    pairs = zip(a["responses"], b["responses"], strict=True)
    return [abs(float(x[0]) - float(y[0])) for x, y in pairs if isinstance(x, list)]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print the tables, keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation", allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="checkpoint folder (default: the demo's)")
    parser.add_argument("--tasks", default="", help=f"of {', '.join((*TASKS, *LONG_CONTEXT))}; comma-separated")
    parser.add_argument(
        "--precisions", default=",".join(PRECISIONS), help="comma-separated; the first is compared with"
    )
    parser.add_argument("--limit", type=int, help="only so many questions of each task of lm-eval")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest prompt and output together")
    parser.add_argument("--num-concurrent", type=int, default=8, help="requests of lm-eval at a time")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--lm-eval-python", type=Path, default=PROJECT / ".venv-lm-eval/bin/python")
    options = parser.parse_args(argv)
    is_demo = options.checkpoint.resolve() == DEMO
    options.tasks = options.tasks.split(",") if options.tasks else [*DEMO_TASKS, *LONG_CONTEXT]
    options.precisions = options.precisions.split(",")
    for given, known in ((options.tasks, (*TASKS, *LONG_CONTEXT)), (options.precisions, PRECISIONS)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is not one of {', '.join(known)}")
    about = conditions("tests.evaluation", sys.argv[1:] if argv is None else argv)
    options.prompts = Prompts.of_checkpoint(options.checkpoint)
    is_compared = is_demo and "log_probs" in options.tasks
    ids = options.prompts.text(options.max_tokens)
    options.reference = reference_log_probs(options.checkpoint, ids) if is_compared else None
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions:
            runs.append(measure(precision, options, Path(folder, precision)))
    compare_samples(runs)
    results = about | {"checkpoint": options.checkpoint.name, "limit": options.limit, "runs": runs}
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    elif is_demo:
        write_results("evaluation", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
