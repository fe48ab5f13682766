"""What a client asked for: frozen, validated once, changed by nobody afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from backend.errors import RequestError

MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_NUM_RETURN_SEQUENCES = 128
MAX_SEED = 2**64 - 1


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high):  # also refuses NaN
        raise RequestError(name, f"must be in [{low}, {high}], got {value!r}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is drawn from its logits, in this order: penalties, `min_tokens` mask, temperature, top-k, top-p, min-p.

    `temperature` 0 is greedy (the largest logit, the lowest id on a tie); the default is greedy. `top_k` 0, `top_p` 1 and
    `min_p` 0 are off. `repetition_penalty` covers prompt and output and divides positive, multiplies negative logits;
    `presence_penalty` and `frequency_penalty` cover the output only and are subtracted once, and once per occurrence.
    `seed` and the token's position key the noise, so a draw does not depend on what else runs.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether no noise is drawn."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the ids seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self) -> None:
        """Raise RequestError naming the first field that is out of its range."""
        _check_range("temperature", self.temperature, 0.0, 100.0)
        if self.temperature != 0.0 and self.temperature < 0.01:
            raise RequestError("temperature", f"must be 0 (greedy) or at least 0.01, got {self.temperature!r}")
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError("top_p", f"must be in (0, 1], got {self.top_p!r}")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if not (0.0 < self.repetition_penalty <= 100.0):
            raise RequestError("repetition_penalty", f"must be in (0, 100], got {self.repetition_penalty!r}")
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_range("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to the engine; each of its `num_return_sequences` becomes a Sequence.

    `handle` is the engine's own key (clients' ids may be empty or repeated), `request_id` the client's.
    `max_tokens` counts output tokens of each sequence; `end_id` and `stop_token_ids` end it (the id is sent and counted),
    `stop_strings` end it at the matched bytes (their ids are sent and counted, their text is not).
    `deadline_ms` counts from arrival; None means the engine's default, which may be none.
    `echo` puts the prompt's ids and text before the output.
    """

    handle: int
    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_return_sequences: int = 1
    stop_strings: tuple[bytes, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    end_id: int | None = None
    ignore_eos: bool = False
    deadline_ms: int | None = None
    echo: bool = False
    stream: bool = False

    def validate(self, vocab_size: int, max_model_len: int) -> None:
        """Raise RequestError naming field, bound and value when the request cannot be served.

        `vocab_size` bounds every token id, `max_model_len` bounds prompt and output tokens together.
        """
        if not self.prompt_token_ids:
            raise RequestError("prompt_token_ids", "must hold at least 1 id, got 0")
        self._check_ids("prompt_token_ids", self.prompt_token_ids, vocab_size)
        self._check_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}")
        if self.end_id is not None:
            self._check_ids("end_id", (self.end_id,), vocab_size)
        if self.max_tokens < 1:
            raise RequestError("max_tokens", f"must be at least 1, got {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError("min_tokens", f"must be in [0, max_tokens = {self.max_tokens}], got {self.min_tokens}")
        num_prompt = len(self.prompt_token_ids)
        if num_prompt >= max_model_len:
            raise RequestError(
                "prompt_token_ids",
                f"the prompt has {num_prompt} tokens, at most {max_model_len - 1} leave room for one more in the served "
                f"max_model_len {max_model_len}",
            )
        if num_prompt + self.max_tokens > max_model_len:
            raise RequestError(
                "max_tokens",
                f"at most {max_model_len - num_prompt} fit behind a prompt of {num_prompt} tokens in the served "
                f"max_model_len {max_model_len}, got {self.max_tokens}",
            )
        if not 1 <= self.num_return_sequences <= MAX_NUM_RETURN_SEQUENCES:
            raise RequestError(
                "num_return_sequences", f"must be in [1, {MAX_NUM_RETURN_SEQUENCES}], got {self.num_return_sequences}"
            )
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise RequestError("stop_words", f"at most {MAX_STOP_STRINGS} strings, got {len(self.stop_strings)}")
        for text in self.stop_strings:
            if not 1 <= len(text) <= MAX_STOP_BYTES:
                raise RequestError("stop_words", f"each must have 1 to {MAX_STOP_BYTES} bytes, got {len(text)}")
        if self.deadline_ms is not None and self.deadline_ms < 1:
            raise RequestError("deadline_ms", f"must be at least 1, got {self.deadline_ms}")
        self.sampling.validate()

    @staticmethod
    def _check_ids(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < vocab_size:
                raise RequestError(name, f"ids must be in [0, {vocab_size - 1}], got {token_id} at index {index}")


def mix_seed(seed: int, sequence_index: int) -> int:
    """Seed of sample `sequence_index` of a request: sample 0 keeps the request's seed, so n = 1 and n > 1 agree on it.

    The others go through the finaliser of SplitMix64 (Steele, Lea, Flood 2014), so that neighbouring seeds do not share samples.
    """
    if sequence_index == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + sequence_index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def num_pages_for(num_tokens: int, page_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens.

    >>> num_pages_for(64, 64), num_pages_for(65, 64)
    (1, 2)
    """
    return math.ceil(num_tokens / page_tokens)
