"""What a served checkpoint makes of long prompts: a needle in a haystack, its own questions behind other text, log-probabilities.

The haystack is the documentation of Python's language that every Python carries (`pydoc_data.topics`, about 465,000 characters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM

from backend.text.tokenizer import Tokenizer
from client import Client, GenerationParams
from tests.demo.questions import Question, read_data

NEEDLE = "\nThe secret number of Marseille is 48213.\n"
QUESTION = "\nThe secret number of Marseille is"
ANSWER = " 48213"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_ANSWER_TOKENS = 12
_MAX_DEMO_ANSWER_TOKENS = 160
_LEAST_TOKENS = 128
_NUM_CONCURRENT = 16
_T = TypeVar("_T")
_R = TypeVar("_R")


@cache
def haystack() -> str:
    """All of the text, in the order of its topics' names."""
    return "\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Prompts:
    """Makes prompts of an exact number of tokens with the tokenizer of a checkpoint."""

    tokenizer: Tokenizer
    hay: tuple[int, ...]

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Prompts:
        """With the vocabulary in `folder`."""
        tokenizer = Tokenizer.from_checkpoint(folder)
        return cls(tokenizer, tuple(tokenizer.encode(haystack(), add_bos=False)))

    def filler(self, num_tokens: int) -> list[int]:
        """The first `num_tokens` ids of the haystack, which begins anew where it ends."""
        return [*self.hay * (num_tokens // len(self.hay)), *self.hay[: num_tokens % len(self.hay)]]

    def text(self, num_tokens: int) -> list[int]:
        """BOS and the haystack, `num_tokens` in all."""
        return [self.tokenizer.bos_id, *self.filler(num_tokens - 1)]

    def needle(self, num_tokens: int, depth: float, needle: str = NEEDLE) -> list[int]:
        """A prompt of `num_tokens`: BOS, haystack with `needle` at `depth` of it (0 to 1), QUESTION.

        ValueError when `num_tokens` leaves no room for a haystack.
        """
        inner = self.tokenizer.encode(needle, add_bos=False) if needle else []
        question = self.tokenizer.encode(QUESTION, add_bos=False)
        num_hay = num_tokens - 1 - len(inner) - len(question)
        if num_hay < 1:
            raise ValueError(f"num_tokens must be at least {num_tokens - num_hay + 1} but is {num_tokens}")
        place, hay = round(depth * num_hay), self.filler(num_hay)
        return [self.tokenizer.bos_id, *hay[:place], *inner, *hay[place:], *question]


def lengths(max_tokens: int) -> list[int]:
    """Lengths to measure, doubling up to `max_tokens`: the last is `max_tokens` itself."""
    powers = range(int(math.log2(_LEAST_TOKENS)), int(math.log2(max_tokens)) + 1)
    return sorted({*(2**power for power in powers if 2**power < max_tokens), max_tokens})


def answer(client: Client, ids: Sequence[int], max_tokens: int) -> str:
    """The greedy continuation of `ids`."""
    params = GenerationParams(max_tokens=max_tokens)
    return "".join(response.text for response in client.generate(params=params, prompt_token_ids=ids))


def log_probs(client: Client, ids: Sequence[int]) -> list[float]:
    """Log-probability of each id of a prompt but the first, in nats: [len(ids) - 1]."""
    params = GenerationParams(max_tokens=0, prompt_logprobs=0)
    places: list[Any] = []
    for response in client.generate(params=params, prompt_token_ids=ids):
        places += response.prompt_log_probs
    return [float(place["log_prob"]) for place in places[1:]]


def _together(action: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    with ThreadPoolExecutor(_NUM_CONCURRENT) as pool:
        return list(pool.map(action, items))


def find_needles(client: Client, prompts: Prompts, max_tokens: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each length and depth: whether greedy decoding gives the number, and by how many nats a token the needle makes
    it likelier than the same prompt without it does (`gain_nats`).
    """
    answer_ids = prompts.tokenizer.encode(ANSWER, add_bos=False)
    cells: list[dict[str, Any]] = []
    for num_tokens in lengths(max_tokens - _MAX_ANSWER_TOKENS):
        without = log_probs(client, prompts.needle(num_tokens, 0.0, needle="") + answer_ids)[-len(answer_ids) :]

        def find(depth: float, num_tokens: int = num_tokens, without: list[float] = without) -> dict[str, Any]:
            ids = prompts.needle(num_tokens, depth)
            text = answer(client, ids, _MAX_ANSWER_TOKENS)
            gain = fmean(log_probs(client, ids + answer_ids)[-len(answer_ids) :]) - fmean(without)
            return {
                "tokens": num_tokens,
                "depth": depth,
                "is_found": text.startswith(ANSWER),
                "gain_nats": gain,
                "text": text,
            }

        cells += _together(find, DEPTHS)
        found = [cell["is_found"] for cell in cells if cell["tokens"] == num_tokens]
        say(f"needle in {num_tokens} tokens: found at {sum(found)} of {len(found)} depths")
    return cells


def ask_behind_text(
    client: Client, prompts: Prompts, max_tokens: int, num_questions: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """How many of the demo checkpoint's English questions are answered exactly behind 0, 64, 128, ... tokens of the haystack."""
    questions = read_data().languages[0].questions[:num_questions]
    room = max_tokens - _MAX_DEMO_ANSWER_TOKENS - max(
        len(prompts.tokenizer.encode(question.ask[0], add_bos=False)) for question in questions
    )  # fmt: skip
    cells = []
    for num_tokens in (0, 64, *lengths(room - 1)):

        def is_right(question: Question, num_tokens: int = num_tokens) -> bool:
            ids = [prompts.tokenizer.bos_id, *prompts.filler(num_tokens)]
            ids += prompts.tokenizer.encode(question.ask[0], add_bos=False)
            return answer(client, ids, _MAX_DEMO_ANSWER_TOKENS) == f" {question.answer}"

        right = sum(_together(is_right, questions))
        cells.append({"tokens_before": num_tokens, "num_right": right, "num_questions": len(questions)})
        say(f"{num_tokens} tokens before: {right} of {len(questions)} right")
    return cells


def reference_log_probs(checkpoint: Path, ids: Sequence[int]) -> list[float]:
    """The same as `log_probs`, from transformers in FP32 on the CPU, with the weights as they are stored."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    found: list[float] = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


def by_position(values: Sequence[float], reference: Sequence[float] | None) -> Iterator[dict[str, Any]]:
    """Log-probabilities of positions 1, 2, ... in ranges that double: their mean, and how far they are from `reference`."""
    ends = lengths(len(values))
    for begin, end in zip((0, *ends), ends, strict=False):
        cell = {"begin": begin + 1, "end": end + 1, "mean_nats": fmean(values[begin:end])}
        if reference is not None:
            distances = [abs(a - b) for a, b in zip(values[begin:end], reference[begin:end], strict=True)]
            cell |= {"reference_mean_nats": fmean(reference[begin:end])}
            cell |= {"mean_distance_nats": fmean(distances), "largest_distance_nats": max(distances)}
        yield cell
