"""What is asked for: prompts and answers of fixed lengths, so many at a time; and the prompts themselves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

FIRST_ID, LAST_ID = 1256, 4095
"""Prompts are of these ids, which every vocabulary here has: behind the special tokens and the single bytes."""


@dataclass(frozen=True)
class Scenario:
    """Requests of `prompt_tokens` that are answered with exactly `output_tokens`, `num_concurrent` at a time.

    `name` is that of the full lengths; at toy scale the lengths are smaller.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    num_concurrent: int

    def describe(self) -> dict[str, str | int]:
        """For the results."""
        return {
            "scenario": self.name,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "concurrent": self.num_concurrent,
        }

    def smaller(self, divisor: int, num_concurrent: int) -> Scenario:
        """The same proportions with lengths divided."""
        lengths = (max(2, self.prompt_tokens // divisor), max(2, self.output_tokens // divisor))
        return replace(
            self,
            prompt_tokens=lengths[0],
            output_tokens=lengths[1],
            num_concurrent=min(self.num_concurrent, num_concurrent),
        )

    def aged(self, num_tokens: int) -> Scenario:
        """A request as if it had been answered for `num_tokens` already: they count as prompt, the rest is still to come.

        >>> Scenario("", 1000, 1000, 4).aged(750)
        Scenario(name='', prompt_tokens=1750, output_tokens=250, num_concurrent=4)
        """
        return replace(
            self, prompt_tokens=self.prompt_tokens + num_tokens, output_tokens=self.output_tokens - num_tokens
        )


SCENARIOS = (
    Scenario("1000/1000", 1000, 1000, 256),
    Scenario("128/2048", 128, 2048, 256),
    Scenario("2048/128", 2048, 128, 64),
    Scenario("20000/2000", 20000, 2000, 32),
)


def make_prompt(number: int, num_tokens: int) -> tuple[int, ...]:
    """Random ids that depend on `number`, so that no two prompts begin alike and no prefix cache helps."""
    return tuple(random.Random(f"prompt {number}").choices(range(FIRST_ID, LAST_ID + 1), k=num_tokens))


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests of a Poisson process arrive, `rate_per_s` on average; endless."""
    generator, at_s = random.Random(f"arrivals {seed}"), 0.0
    while True:
        at_s += generator.expovariate(rate_per_s)
        yield at_s
