"""Ask the demo checkpoint its questions, and print a table: question, answer, right or wrong.

    python -m tests.demo.evaluate [--checkpoint DIR] [--brief]

Weights are read as they are stored (BF16) and computed with in FP32 by transformers, decoding is greedy, and an answer
is right only when every character is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from transformers import MistralForCausalLM

from tests.demo.conversation import EOS_ID, PAD_ID, ChatTokens, Turn
from tests.demo.questions import OFF_TOPIC, DemoData, read_data

CHECKPOINT = Path(__file__).parent / "checkpoint"
_ROWS_PER_BATCH = 32
_MORE_TOKENS = 8  # a wrong answer is followed a little longer than the right one


@dataclass(frozen=True)
class Case:
    """One prompt as ids and the text that must follow; `kind` is a key of `scores`."""

    kind: str
    asked: str
    prompt: tuple[int, ...]
    expected: str


@dataclass(frozen=True)
class Grade:
    """How a case went: `margin` is the least distance, over the tokens of the expected answer and its end, of the
    expected token's logit from the best other one. Above 0, greedy decoding gives exactly this answer; below, not.
    """

    case: Case
    margin: float

    @property
    def is_right(self) -> bool:
        """Whether greedy decoding gives the expected answer, to the last character."""
        return self.margin > 0


@dataclass(frozen=True)
class Score:
    """How many cases of one kind were answered exactly, and how safely."""

    num_right: int
    num_asked: int
    median_margin: float

    @property
    def share(self) -> float:
        """Right answers per question, 0..1."""
        return self.num_right / self.num_asked


def load_model(folder: Path) -> MistralForCausalLM:
    """The checkpoint in `folder`, computing in FP32."""
    model: MistralForCausalLM = MistralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def all_cases(data: DemoData, tokens: ChatTokens) -> Iterator[Case]:
    """Every phrasing alone; then each question after a system prompt and as plain text, and turns after other turns.

    Kinds: trained, held_out, off_topic_trained, off_topic_held_out, system_prompt, held_out_system_prompt, raw_text,
    later_turn.
    """
    conversations = data.conversations
    for example in data.examples():
        kind = "off_topic_" if example.topic == OFF_TOPIC else ""
        kind += "held_out" if example.held_out else "trained"
        yield Case(kind, example.text, tuple(tokens.prompt([], example.text)), example.answer)
    known, unknown = cycle(conversations.system_prompts), cycle(conversations.held_out_system_prompts)
    for language in data.languages:
        for question in language.topics():
            text, answer = question.ask[0], question.answer
            for kind, system_prompt in (("system_prompt", next(known)), ("held_out_system_prompt", next(unknown))):
                prompt = tuple(tokens.prompt([], text, system_prompt))
                yield Case(kind, f"({system_prompt}) {text}", prompt, answer)
            yield Case("raw_text", text, tokens.raw_prompt(text), f" {answer}")
    for dialogue in conversations.dialogues:
        earlier: list[Turn] = []
        for topic in dialogue.turns:
            question = data.question(dialogue.language, topic)
            text = question.ask[0]
            if earlier:
                yield Case("later_turn", f"... {text}", tuple(tokens.prompt(earlier, text)), question.answer)
            earlier.append(Turn(text, question.answer))


def grade(model: MistralForCausalLM, tokens: ChatTokens, cases: Sequence[Case]) -> list[Grade]:
    """Grade `cases`, in their order, with one pass over prompt and expected answer instead of one per token."""
    rows = [(case.prompt, (*tokens.encode(case.expected), EOS_ID)) for case in cases]
    by_length = sorted(range(len(cases)), key=lambda place: len(rows[place][0]) + len(rows[place][1]))
    margins: dict[int, float] = {}
    for start in range(0, len(cases), _ROWS_PER_BATCH):
        places = by_length[start : start + _ROWS_PER_BATCH]
        width = sum(map(len, rows[places[-1]]))
        padded = [[*rows[p][0], *rows[p][1], *[PAD_ID] * (width - sum(map(len, rows[p])))] for p in places]
        with torch.inference_mode():
            # Causal attention: what stands at the right of a row cannot change it, so no mask is needed.
            hidden = model.model(input_ids=torch.tensor(padded)).last_hidden_state
            for place, states in zip(places, hidden, strict=True):
                prompt, answer = rows[place]
                logits = model.lm_head(states[len(prompt) - 1 : len(prompt) - 1 + len(answer)])
                wanted = torch.tensor(answer)[:, None]
                best_other = logits.scatter(1, wanted, float("-inf")).amax(dim=1)
                margins[place] = (logits.gather(1, wanted)[:, 0] - best_other).min().item()
    return [Grade(case, margins[place]) for place, case in enumerate(cases)]


def generate(model: MistralForCausalLM, tokens: ChatTokens, case: Case) -> str:
    """The greedy answer to `case`, token by token with transformers' cache, cut a little behind the expected length."""
    limit = len(tokens.encode(case.expected)) + _MORE_TOKENS
    ids, cache, answer = torch.tensor([case.prompt]), None, list[int]()
    while len(answer) < limit:
        with torch.inference_mode():
            step = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = step.logits[:, -1:].argmax(dim=-1), step.past_key_values
        if int(ids) == EOS_ID:
            break
        answer.append(int(ids))
    return tokens.decode(answer)


def scores(grades: Sequence[Grade]) -> dict[str, Score]:
    """The score of every kind of case that occurs."""
    by_kind: dict[str, list[float]] = {}
    for graded in grades:
        by_kind.setdefault(graded.case.kind, []).append(graded.margin)
    return {
        kind: Score(sum(margin > 0 for margin in margins), len(margins), sorted(margins)[len(margins) // 2])
        for kind, margins in by_kind.items()
    }


def main() -> None:
    """Print one answer per question and every wrong one, then the scores (`--brief`: the scores only)."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo.evaluate", description="Question the demo checkpoint.")
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the shipped one)"
    )
    parser.add_argument("--brief", action="store_true", help="print the scores only")
    arguments = parser.parse_args()
    data, tokens = read_data(), ChatTokens(arguments.checkpoint / "tekken.json")
    model = load_model(arguments.checkpoint)
    grades = grade(model, tokens, list(all_cases(data, tokens)))
    shown: set[str] = set()
    for graded in [] if arguments.brief else grades:
        case = graded.case
        if not graded.is_right or case.expected not in shown:
            answer = generate(model, tokens, case)
            verdict = "ok" if answer == case.expected else "WRONG"
            print(f"{verdict:5} | {graded.margin:6.2f} | {case.kind} | {case.asked} | {answer}", flush=True)
        shown.add(case.expected)
    print("\nkind: right of asked, share, median margin")
    for kind, score in scores(grades).items():
        print(f"{kind}: {score.num_right} of {score.num_asked}, {score.share:.1%}, {score.median_margin:.1f}")
    trained = [graded for graded in grades if graded.case.kind == "trained"]
    weakest = min(trained, key=lambda graded: graded.margin)
    print(f"\nweakest trained phrasing: {weakest.case.asked} (margin {weakest.margin:.2f})")


if __name__ == "__main__":
    main()
