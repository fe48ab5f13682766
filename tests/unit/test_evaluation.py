"""`make eval` without a server: what is asked, and what its tables say of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.demo.questions import read_data
from tests.evaluation.__main__ import compare_samples
from tests.evaluation.demo_tasks import write_demo_tasks
from tests.evaluation.long_context import ANSWER, DEPTHS, NEEDLE, QUESTION, Prompts, by_position, lengths
from tests.evaluation.published import DEMO_TASKS, TASKS
from tests.evaluation.report import report

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
TASK_FILES = Path(__file__).parents[1] / "evaluation" / "tasks"


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.of_checkpoint(DEMO)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_demo_task_has_its_file_and_data(tmp_path: Path) -> None:
    write_demo_tasks(tmp_path)
    assert {path.stem for path in TASK_FILES.glob("*.yaml")} == set(DEMO_TASKS)
    assert {path.stem for path in tmp_path.iterdir()} == set(DEMO_TASKS)
    for name in DEMO_TASKS:
        assert f"test: {name}.jsonl" in (TASK_FILES / f"{name}.yaml").read_text()


def test_the_right_choice_is_the_answer_and_its_place_tells_nothing(tmp_path: Path) -> None:
    write_demo_tasks(tmp_path)
    answers = {example.text: example.answer for example in read_data().examples()}
    choices = rows(tmp_path / "demo_choice.jsonl")
    for row in choices:
        assert row["choices"][row["gold"]] == answers[row["question"]]
        assert len(set(row["choices"])) == 4
    counts = [sum(row["gold"] == place for row in choices) for place in range(4)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("num_tokens", [64, 1000])
def test_needle_lies_at_its_depth(prompts: Prompts, num_tokens: int, depth: float) -> None:
    ids = prompts.needle(num_tokens, depth)
    text = prompts.tokenizer.decode(ids)
    assert len(ids) == num_tokens
    assert ids[0] == prompts.tokenizer.bos_id
    assert text.endswith(QUESTION)
    assert text.count(ANSWER.strip()) == 1
    needle = prompts.tokenizer.encode(NEEDLE, add_bos=False)
    (place,) = [start for start in range(num_tokens) if ids[start : start + len(needle)] == needle]
    hay = num_tokens - 1 - len(needle) - len(prompts.tokenizer.encode(QUESTION, add_bos=False))
    assert place - 1 == round(depth * hay)


def test_a_prompt_without_room_for_hay_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="num_tokens must be at least"):
        prompts.needle(20, 0.5)


def test_filler_begins_anew(prompts: Prompts) -> None:
    num_hay = len(prompts.hay)
    assert prompts.filler(num_hay + 3)[num_hay:] == list(prompts.hay[:3])


def test_lengths_double_up_to_the_last() -> None:
    assert lengths(1000) == [128, 256, 512, 1000]
    assert lengths(1024) == [128, 256, 512, 1024]


def test_every_position_is_in_one_range() -> None:
    cells = list(by_position([-1.0] * 127 + [-3.0] * 200, [-1.5] * 327))
    assert [(cell["begin"], cell["end"]) for cell in cells] == [(1, 129), (129, 257), (257, 328)]
    assert cells[0]["mean_nats"] == pytest.approx(-130 / 128)
    assert cells[0]["largest_distance_nats"] == 1.5
    assert cells[2]["mean_distance_nats"] == 1.5
    assert cells[2]["reference_mean_nats"] == -1.5


def test_tables_have_published_beside_measured_and_count_other_answers() -> None:
    def samples(second: float, text: str) -> dict[str, Any]:
        choice = {"responses": [["-1.0", "True"], [str(second), "False"]]}
        return {
            "mmlu": {"value": 0.675, "standard_error": 0.004, "samples": [choice, choice]},
            "triviaqa": {"value": 0.5, "standard_error": None, "samples": [{"responses": ["Paris"]}, {"responses": [text]}]},
        }  # fmt: skip

    runs: list[dict[str, Any]] = [
        {"precision": "bf16", "scores": samples(-2.0, "Rome")},
        {"precision": "fp8", "scores": samples(-0.5, "Bonn")},
    ]
    compare_samples(runs)
    assert [run["scores"]["mmlu"]["num_changed"] for run in runs] == [0, 2]
    assert runs[1]["scores"]["mmlu"]["mean_log_prob_distance_nats"] == 0.75
    lines = report({"runs": runs}).splitlines()
    assert lines[2:] == [
        "| mmlu (5, acc) | 2 | 68.0 | 67.5 ± 0.4 | 67.5 ± 0.4 | 2 |",
        "| triviaqa (5, exact_match) | 2 | 73.8 | 50.0 | 50.0 | 1 |",
    ]


def test_published_values_are_those_of_the_model_card() -> None:
    # https://huggingface.co/mistralai/Mistral-Nemo-Base-2407, "Main Benchmarks"
    published = {name: (task.num_fewshot, task.published) for name, task in TASKS.items() if task.published}
    assert published == {"mmlu": (5, 68.0), "hellaswag": (0, 83.5), "winogrande": (0, 76.8), "triviaqa": (5, 73.8)}
