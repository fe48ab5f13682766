"""What the demo checkpoint is asked through lm-eval: its own questions, as the JSON lines that tasks/*.yaml name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.demo.questions import Question, read_data

_NUM_CHOICES = 4


def write_demo_tasks(folder: Path) -> None:
    """Write demo_choice.jsonl, demo_answer.jsonl and demo_text.jsonl into `folder`."""
    choices: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for language in read_data().languages:
        for place, question in enumerate(language.questions):
            # Half of the phrasings were trained (chat and plain), half never seen.
            for text in (question.ask[0], question.held_out[0]):
                choices.append(_choice(language.questions, place, text, gold=len(choices) % _NUM_CHOICES))
                answers.append({"question": text, "answer": question.answer})
    _write(folder / "demo_choice.jsonl", choices)
    _write(folder / "demo_answer.jsonl", answers)
    _write(folder / "demo_text.jsonl", [{"text": f"{row['question']} {row['answer']}"} for row in answers])


def _choice(questions: Sequence[Question], place: int, text: str, gold: int) -> dict[str, Any]:
    """The right answer at index `gold` among those of the questions around it, which are about similar things."""
    others = [questions[(place + step) % len(questions)].answer for step in range(1, _NUM_CHOICES)]
    return {"question": text, "choices": [*others[:gold], questions[place].answer, *others[gold:]], "gold": gold}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
