"""Runs lm-eval against a gateway; executed by the Python of .venv-lm-eval, which has lm-eval and nothing of this project.

    .venv-lm-eval/bin/python tests/evaluation/run_lm_eval.py JOB.json

JOB: {"url", "model", "bos_id", "max_length", "num_concurrent", "limit" (or null), "tasks": [{"name", "metric", "num_fewshot",
"runs_code"}], "task_folder", "output"}. Writes to `output` for each task: the metric, its standard error, and what the model
gave for each sample.

lm-eval's remote tokenizer leaves out the beginning-of-sequence id, which Mistral NeMo was trained with: it is put in front here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager


class CompletionsWithBos(LocalCompletionsAPI):  # type: ignore[misc]
    """lm-eval's own `local-completions`, with the beginning-of-sequence id before every text."""

    def __init__(self, bos_id: int, **settings: Any) -> None:
        super().__init__(tokenizer_backend="remote", custom_prefix_token_id=bos_id, **settings)
        self._bos = [bos_id]

    def tok_encode(self, string: Any, left_truncate_len: int | None = None, **_: Any) -> Any:
        """Ids of a text, or of each of several; cut from the left, the first id stays."""
        if not isinstance(string, str):
            return [self.tok_encode(each, left_truncate_len) for each in string]
        ids = self.tokenizer.encode(string)
        return self._bos + (ids[-(left_truncate_len - 1) :] if left_truncate_len else ids)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-eval has it: there the id comes as the prefix of the first window, so no text gets it before."""
        bos, self._bos = self._bos, []
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._bos = bos


def main(job: dict[str, Any]) -> None:
    """Run every task of the job, one after the other."""
    model = CompletionsWithBos(
        job["bos_id"],
        base_url=f"{job['url']}/v1/completions",
        model=job["model"],
        num_concurrent=job["num_concurrent"],
        max_length=job["max_length"],
        max_retries=2,
        timeout=1800,
    )
    tasks, outcomes = TaskManager(include_path=job["task_folder"]), {}
    for task in job["tasks"]:
        found = simple_evaluate(
            model,
            tasks=[task["name"]],
            num_fewshot=task["num_fewshot"],
            limit=job["limit"],
            task_manager=tasks,
            confirm_run_unsafe_code=task["runs_code"],
            bootstrap_iters=100,
        )
        # A group such as mmlu has its mean under its own name, and its samples under those of its parts.
        scores = (found.get("groups") or {}).get(task["name"]) or found["results"][task["name"]]
        if task["metric"] not in scores:
            raise KeyError(f"{task['name']}: lm-eval gives {', '.join(scores)}, not {task['metric']}")
        samples = [
            {"task": name, "doc_id": sample["doc_id"], "responses": sample["filtered_resps"]}
            for name, rows in found["samples"].items()
            for sample in sorted(rows, key=lambda row: row["doc_id"])
        ]
        error = scores.get(task["metric"].replace(",", "_stderr,"))
        outcomes[task["name"]] = {
            "value": scores[task["metric"]],
            "standard_error": error if isinstance(error, float) else None,
            "samples": samples,
        }
    Path(job["output"]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
