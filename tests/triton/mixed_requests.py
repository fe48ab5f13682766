"""Requests of every kind, drawn from a seed: what a server under load is asked, each with all that makes it different."""

from __future__ import annotations

import json
import random
from typing import Any

TEXTS = ("The", "Il était une fois", "你好，世界", "مرحبا بالعالم", "def main():\n", "Grüße 👩‍👩‍👧", "x" * 200, "")
SHARED_PROMPTS = tuple([1, *range(first, first + 250)] for first in (1300, 1700, 2100))
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
GUIDES = (
    ("json_schema", json.dumps(SCHEMA)),
    ("regex", "[a-c]{3}-[0-9]{2}"),
    ("choice", json.dumps(["certainly so", "not at all", "perhaps: é"])),
    ("ebnf_grammar", 'start: "a" NUMBER "b"\nNUMBER: /[0-9]{1,3}/'),
)
MAX_PROMPT_TOKENS = 300
MAX_TOKENS = 80


def mixed_request(seed: int, index: int) -> dict[str, Any]:
    """The inputs of a request that a server with room for 384 tokens takes; the same seed and index give the same request."""
    rng = random.Random(f"{seed}/{index}")
    request: dict[str, Any] = _prompt(rng, index) | {"max_tokens": rng.randint(1, MAX_TOKENS)}
    if rng.random() < 0.6:
        request |= {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": rng.randrange(2**31)}
        request |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 100, "top_p": 0.9}])
    if rng.random() < 0.2:
        request |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    if rng.random() < 0.2:
        request["num_return_sequences"] = rng.randint(2, 4)
    if rng.random() < 0.15:
        request["exclude_input_in_output"] = False
    if rng.random() < 0.15:
        request |= {"logit_bias_ids": [1500, 1501], "logit_bias_values": [3.0, -5.0]}
    if rng.random() < 0.15:
        request |= rng.choice([{"return_log_probs": True}, {"num_logprobs": 2}])
    if rng.random() < 0.15:
        kind, text = rng.choice(GUIDES)
        return request | {"guided_decoding_guide_type": kind, "guided_decoding_guide": text, "max_tokens": MAX_TOKENS}
    if rng.random() < 0.5:
        request["ignore_eos"] = True
    if rng.random() < 0.1:
        request |= {"bad_words": ["a", "the"], "min_tokens": 1}
    return request


def _prompt(rng: random.Random, index: int) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.3:
        return {"text_input": rng.choice(TEXTS) + str(index)}
    if kind < 0.4:
        return {"messages": json.dumps([{"role": "user", "content": f"What is number {index}?"}])}
    if kind < 0.7:  # its beginning is in the prefix cache as soon as another had it
        shared = rng.choice(SHARED_PROMPTS)[: rng.randint(60, 250)]
        return {"prompt_token_ids": [*shared, *(rng.randrange(1000, 4096) for _ in range(rng.randint(1, 40)))]}
    return {"prompt_token_ids": [rng.randrange(1000, 4096) for _ in range(rng.randint(1, MAX_PROMPT_TOKENS))]}
