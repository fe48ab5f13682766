"""Guided decoding: which token ids may come next so that the output follows a schema, a regular expression, a grammar.

llguidance does the parsing (an Earley parser over a lexer of derivatives, walked along a trie of the vocabulary); this
file gives it the vocabulary, bounds what a client can make it do, and keeps control tokens out. guide_grammar.py says
what a guide can be, guide_checker.py why it is tried in another process first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from backend.checkpoint.vocabulary import Vocabulary
from backend.engine.guide_checker import GuideChecker, GuideRefused
from backend.engine.guide_grammar import GuideKind, new_matcher, problem_of, to_grammar
from backend.errors import RequestError, shown

KIND_FIELD = "guided_decoding_guide_type"
TEXT_FIELD = "guided_decoding_guide"
MAX_GUIDE_BYTES = 256 * 1024
MAX_CACHED_GUIDES = 64
_WORD_BITS = 32

# llguidance's own tokenizer is quadratic in the length of a word. Only a forced run of 256 letters, marks or blanks
# without a break is cut into pieces that Tekken would not cut; its ids are still ids of the same text.
_LONG_WORDS = r"[\p{L}\p{M}]{256}|[^\s\p{L}\p{N}]{256}|\s{256}|"

Mask = npt.NDArray[np.int32]


class GuideCompiler:
    """Compiles guides for one vocabulary, and remembers which of the last ones compile; threads may share it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._eos_id = vocabulary.eos_id
        self._text_mask = _text_mask(vocabulary)
        # NOTE: special tokens are given no bytes and no names, so no text and no `<name>` of a grammar matches one.
        self._tokenizer: LLTokenizer = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
            encoder={token: token_id for token_id, token in enumerate(vocabulary.token_bytes) if token},
            special_tokens={},
            pattern=_LONG_WORDS + vocabulary.pattern,
            eos_token=vocabulary.eos_id,
            n_vocab=vocabulary.vocab_size,
        )
        self._checker = GuideChecker()
        self._checker_lock = threading.Lock()
        self._grammars: OrderedDict[tuple[GuideKind, str], str] = OrderedDict()
        self._grammars_lock = threading.Lock()

    def compile(self, kind: str, text: str, num_matchers: int = 1) -> Guide:
        """Compile the guide `text` of `kind` (a GuideKind), and make the matchers of that many sequences ready.

        Takes about a millisecond, some more for a new guide, at most a few seconds: call it where nobody waits.
        RequestError for an unknown kind, and for a text that is missing, longer than MAX_GUIDE_BYTES in UTF-8, not
        valid, not supported, or too complex.
        """
        guide_kind = _kind(kind)
        _check_text(guide_kind, text)
        guide = Guide(self._tokenizer, self._grammar(guide_kind, text), self._text_mask, self._eos_id)
        guide.make_ready(num_matchers)
        return guide

    def close(self) -> None:
        """End the process that tries guides first."""
        with self._checker_lock:
            self._checker.close()

    def _grammar(self, kind: GuideKind, text: str) -> str:
        """The grammar of a guide. One that compiled before does not wait for one that is being tried."""
        key = (kind, text)
        if grammar := self._remembered(key):
            return grammar
        if kind is GuideKind.JSON:  # the one guide that is not the client's own text needs no trial
            grammar = to_grammar(kind, text)
        else:
            with self._checker_lock:
                # It may have been tried while this one waited for the lock.
                grammar = self._remembered(key) or self._tried(kind, text)
        with self._grammars_lock:
            self._grammars[key] = grammar
            if len(self._grammars) > MAX_CACHED_GUIDES:
                self._grammars.popitem(last=False)
        return grammar

    def _remembered(self, key: tuple[GuideKind, str]) -> str | None:
        with self._grammars_lock:
            if key in self._grammars:
                self._grammars.move_to_end(key)
            return self._grammars.get(key)

    def _tried(self, kind: GuideKind, text: str) -> str:
        try:
            return self._checker.check(kind, text)
        except GuideRefused as refusal:
            raise RequestError(TEXT_FIELD, f"not a usable {kind}: {refusal}") from None


class Guide:
    """A guide that compiles; every sequence that follows it starts a matcher of its own."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, text_mask: Mask, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self._grammar = grammar
        self._text_mask = text_mask
        self._eos_id = eos_id
        self._ready: deque[GuideMatcher] = deque()

    def make_ready(self, num_matchers: int) -> None:
        """Make that many matchers, which `start` hands out at once; RequestError when no text matches the guide."""
        for _ in range(num_matchers):
            matcher = self._new_matcher()
            matcher.mask()
            self._ready.append(matcher)

    def start(self) -> GuideMatcher:
        """A matcher at the beginning, independent of all others."""
        try:
            return self._ready.popleft()
        except IndexError:
            return self._new_matcher()

    def _new_matcher(self) -> GuideMatcher:
        matcher = new_matcher(self._tokenizer, self._grammar)
        if problem := problem_of(matcher):
            raise RequestError(TEXT_FIELD, f"cannot be used: {problem}")
        return GuideMatcher(matcher, self._text_mask, self._eos_id)


class GuideMatcher:
    """How far one sequence is in its guide. Everything it says depends on the ids accepted so far alone.

    Where the next text is certain, llguidance says how Tekken would cut it: those forced ids are looked up once, after
    the last free choice, and come one after the other, whoever asks and in whatever order.
    `mask` (so also `is_complete`) and `accept` raise RequestError when the guide turns out to be too complex, or no
    text can follow (which a grammar may do late: it is not proven to have an end).
    """

    def __init__(self, matcher: LLMatcher, text_mask: Mask, eos_id: int) -> None:
        self._matcher = matcher
        self._text_mask = text_mask
        self._eos_id = eos_id
        self._eos_word, self._eos_bit = eos_id // _WORD_BITS, _bit(eos_id)
        self._forced: deque[int] = deque()
        self._has_looked_ahead = False
        self._mask: Mask | None = None
        self._has_ended = False

    @property
    def may_end(self) -> bool:
        """Whether the output so far is whole, so that the end-of-sequence id is allowed."""
        return self._has_ended or self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end-of-sequence id can follow."""
        if self._has_ended:
            return True
        words = self._allowed()
        return bool(words[self._eos_word] == self._eos_bit) and np.count_nonzero(words) == 1

    def forced_ids(self) -> tuple[int, ...]:
        """Ids that must come next, one after the other, none of them special; none when there is a choice or an end."""
        return tuple(self._look_ahead())

    def mask(self) -> Mask:
        """Allowed ids, INT32 [ceil(V / 32)], a new array: id i is bit i % 32 of word i // 32.

        The end-of-sequence id is allowed exactly when the output may end, other special ids never.
        """
        return self._allowed().copy()

    def accept(self, token_id: int) -> None:
        """Go on by an id that is allowed; RuntimeError when it is not."""
        forced = self._look_ahead()
        is_allowed = token_id == forced[0] if forced else _is_set(self._allowed(), token_id)
        if self._has_ended or not is_allowed:
            raise RuntimeError(f"the guide does not allow id {token_id}")
        if not self._matcher.consume_token(token_id):
            raise RequestError(TEXT_FIELD, f"cannot be followed: {problem_of(self._matcher)}")
        self._mask = None
        self._has_ended = token_id == self._eos_id
        if forced:
            forced.popleft()
        self._has_looked_ahead = bool(forced)

    def _look_ahead(self) -> deque[int]:
        if not self._has_looked_ahead and not self._has_ended:
            for token_id in self._matcher.compute_ff_tokens():
                if not _is_set(self._text_mask, token_id):
                    break  # a special token: `mask` will say that nothing can follow
                self._forced.append(token_id)
            self._has_looked_ahead = True
        return self._forced

    def _allowed(self) -> Mask:
        if self._mask is None:
            self._mask = self._new_mask()
        return self._mask

    def _new_mask(self) -> Mask:
        words = np.zeros_like(self._text_mask)
        if self._has_ended:
            words[self._eos_word] = self._eos_bit
            return words
        if forced := self._look_ahead():
            words[forced[0] // _WORD_BITS] = _bit(forced[0])
            return words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        words &= self._text_mask
        if self._matcher.is_accepting():
            words[self._eos_word] |= self._eos_bit
        if not words.any():
            problem = problem_of(self._matcher) or "no text can follow"
            raise RequestError(TEXT_FIELD, f"cannot be followed: {problem}")
        return words


def _is_set(words: Mask, token_id: int) -> bool:
    word = token_id // _WORD_BITS
    return 0 <= word < len(words) and bool(words[word] & _bit(token_id))


def _bit(token_id: int) -> np.int32:
    return np.uint32(1 << token_id % _WORD_BITS).view(np.int32)


def _text_mask(vocabulary: Vocabulary) -> Mask:
    is_text = np.zeros(-(-vocabulary.vocab_size // _WORD_BITS) * _WORD_BITS, dtype=bool)
    is_text[vocabulary.num_special_tokens : vocabulary.vocab_size] = True
    return np.packbits(is_text, bitorder="little").view("<i4").astype(np.int32)


def _kind(kind: str) -> GuideKind:
    try:
        return GuideKind(kind)
    except ValueError:
        kinds = ", ".join(GuideKind)
        raise RequestError(KIND_FIELD, f"must be one of {kinds}, got {shown(kind)}") from None


def _check_text(kind: GuideKind, text: str) -> None:
    if kind is GuideKind.JSON:
        if text:
            raise RequestError(TEXT_FIELD, f"must be empty for json (a schema needs json_schema), got {shown(text)}")
        return
    if not text.strip():
        raise RequestError(TEXT_FIELD, f"must not be empty for {kind}, got {shown(text)}")
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise RequestError(TEXT_FIELD, f"is not Unicode text: lone surrogate at character {error.start}") from None
    if num_bytes > MAX_GUIDE_BYTES:
        raise RequestError(TEXT_FIELD, f"must have at most {MAX_GUIDE_BYTES} bytes, got {num_bytes}")
