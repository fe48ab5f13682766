"""What a client asked for: frozen, validated once, changed by nobody afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from backend.errors import RequestError

MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_NUM_RETURN_SEQUENCES = 128
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 64
MAX_LOGPROBS = 20
MAX_PRIORITY = 1000
MAX_SALT_CHARACTERS = 256
MAX_SEED = 2**64 - 1


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high):  # also refuses NaN
        raise RequestError(name, f"must be in [{low}, {high}], got {value!r}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is drawn from its logits, in this order: penalties, `logit_bias`, `bad_words` and `min_tokens` masks,
    temperature, top-k, top-p, min-p.

    `temperature` 0 is greedy (the largest logit, the lowest id on a tie); the default is greedy. `top_k` 0, `top_p` 1 and
    `min_p` 0 are off. `repetition_penalty` covers prompt and output and divides positive, multiplies negative logits;
    `presence_penalty` and `frequency_penalty` cover the output only and are subtracted once, and once per occurrence.
    `logit_bias` is added to the logits of its ids. `bad_words` are sequences of ids: the last id of one is never drawn where the
    output ends in the ids before it.
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
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

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
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError("logit_bias_ids", f"at most {MAX_LOGIT_BIAS} ids, got {len(self.logit_bias)}")
        for _, value in self.logit_bias:
            _check_range("logit_bias_values", value, -100.0, 100.0)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise RequestError("bad_words", f"at most {MAX_BAD_WORDS} words, got {len(self.bad_words)}")
        for word in self.bad_words:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise RequestError("bad_words", f"each must have 1 to {MAX_BAD_WORD_TOKENS} tokens, got {len(word)}")


@dataclass(frozen=True, slots=True)
class GuideSpec:
    """A grammar as the client gave it: `kind` is one of GuideKind (guide.py), `text` the schema, regex, grammar or choices."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to the engine; each of its `num_return_sequences` becomes a Sequence.

    `handle` is the engine's own key (clients' ids may be empty or repeated), `request_id` the client's.
    `max_tokens` counts output tokens of each sequence; `end_id` and `stop_token_ids` end it (the id is sent and counted),
    `stop_strings` end it at the matched bytes (their ids are sent and counted, their text is not).
    `deadline_ms` counts from arrival; None means the engine's default, which may be none.
    `echo` puts the prompt's ids and text before the output.
    `priority`: lower runs first. Requests share prefix pages only with those of the same `cache_salt`.
    `num_logprobs` None: none; otherwise the drawn token's log-probability and those of the so many most likely.
    `guide`: a grammar the output must follow.
    `num_prompt_logprobs`: the same for the prompt; only then `max_tokens` may be 0 (score the prompt, generate nothing).
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
    priority: int = 0
    cache_salt: str = ""
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    guide: GuideSpec | None = None

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
        least = 1 if self.num_prompt_logprobs is None else 0
        if self.max_tokens < least:
            hint = " (0 needs prompt_logprobs)" if least else ""
            raise RequestError("max_tokens", f"must be at least {least}{hint}, got {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError("min_tokens", f"must be in [0, max_tokens = {self.max_tokens}], got {self.min_tokens}")
        num_prompt = len(self.prompt_token_ids)
        if num_prompt > max_model_len - least:
            raise RequestError(
                "prompt_token_ids",
                f"the prompt has {num_prompt} tokens, at most {max_model_len - least} fit with {least} more into the served "
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
        _check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if len(self.cache_salt) > MAX_SALT_CHARACTERS:
            raise RequestError("cache_salt", f"at most {MAX_SALT_CHARACTERS} characters, got {len(self.cache_salt)}")
        for name, value in (("num_logprobs", self.num_logprobs), ("prompt_logprobs", self.num_prompt_logprobs)):
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        self._check_ids("logit_bias_ids", tuple(token_id for token_id, _ in self.sampling.logit_bias), vocab_size)
        for word in self.sampling.bad_words:
            self._check_ids("bad_words", word, vocab_size)
        self.sampling.validate()
        if self.guide is not None:
            self._check_guide()

    def _check_guide(self) -> None:
        """A grammar decides itself where an output ends and what may come: refuse what would contradict it."""
        contradictions = {
            "ignore_eos": self.ignore_eos,
            "end_id": self.end_id is not None,
            "min_tokens": self.min_tokens > 0,
            "bad_words": bool(self.sampling.bad_words),
        }
        for name, is_given in contradictions.items():
            if is_given:
                raise RequestError(name, "cannot be combined with guided decoding: leave one of them out")

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
