"""The tasks that the kit knows: how each is run, which of lm-eval's metrics counts, and what was published for it.

Published values are of the base model, from the table "Main Benchmarks" and its shots in the model card
<https://huggingface.co/mistralai/Mistral-Nemo-Base-2407>, in percent. lm-eval's prompts need not be those that were used there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task of lm-eval: `metric` as its results name it, `num_fewshot` examples before each question.

    `published` is None where no value was. `runs_code` marks tasks that execute what the model writes.
    """

    name: str
    metric: str
    num_fewshot: int = 0
    published: float | None = None
    runs_code: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("mmlu", "acc,none", num_fewshot=5, published=68.0),
        Task("hellaswag", "acc_norm,none", published=83.5),
        Task("winogrande", "acc,none", published=76.8),
        Task("triviaqa", "exact_match,remove_whitespace", num_fewshot=5, published=73.8),
        Task("humaneval", "pass@1,create_test", runs_code=True),
        Task("demo_choice", "acc,none"),
        Task("demo_answer", "exact_match,none"),
        Task("demo_text", "bits_per_byte,none"),
    )
}
DEMO_TASKS = ("demo_choice", "demo_answer", "demo_text")
