"""A vocabulary with its guide compiler, and random walks through guides that check every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from backend.checkpoint.vocabulary import Vocabulary, read_vocabulary
from backend.engine.guide import GuideCompiler, GuideMatcher
from tests.demo.make_tekken import cut_tekken

DEMO_VOCAB_SIZE = 4096
FULL_VOCAB_SIZE = 131_072
NUM_SPECIAL_TOKENS = 1000
MAX_WALK_TOKENS = 600


@dataclass(frozen=True)
class Served:
    """A vocabulary with its compiler, and which of its ids close something (so that a random walk comes to an end)."""

    vocabulary: Vocabulary
    compiler: GuideCompiler
    closers: npt.NDArray[np.bool_]

    def text(self, ids: list[int]) -> str:
        return b"".join(self.vocabulary.token_bytes[token_id] for token_id in ids).decode("utf-8")


def serve(folder: pytest.TempPathFactory, vocab_size: int) -> Iterator[Served]:
    path = folder.mktemp(f"vocabulary_{vocab_size}")
    (path / "tekken.json").write_text(cut_tekken(vocab_size=vocab_size), encoding="utf-8")
    vocabulary = read_vocabulary(path)
    closers = np.array([token[:1] in (b'"', b"}", b"]", b")") for token in vocabulary.token_bytes])
    compiler = GuideCompiler(vocabulary)
    yield Served(vocabulary, compiler, closers)
    compiler.close()


def allowed_ids(matcher: GuideMatcher) -> npt.NDArray[np.int64]:
    """Read a mask as the sampler does: bit `id & 31` of word `id >> 5`."""
    words = matcher.mask()
    assert words.dtype == np.int32
    ids = np.arange(len(words) * 32)
    is_allowed: npt.NDArray[np.bool_] = (words[ids >> 5] >> (ids & 31)) & 1 == 1
    return ids[is_allowed]


def walk(
    served: Served, matcher: GuideMatcher, rng: np.random.Generator, most: int = 60, *, ask: bool = True
) -> list[int]:
    """Draw ids at random until the end; after `most` of them end or close whatever can be. Checks every step.

    `ask`: take forced ids as such; otherwise only masks are looked at.
    """
    eos_id = served.vocabulary.eos_id
    ids: list[int] = []
    while len(ids) < MAX_WALK_TOKENS:
        if ask and (forced := matcher.forced_ids()):
            for position, token_id in enumerate(forced):
                assert matcher.forced_ids() == forced[position:]
                assert not matcher.may_end
                assert allowed_ids(matcher).tolist() == [token_id]
                matcher.accept(token_id)
            ids.extend(forced)
            continue
        allowed = allowed_ids(matcher)
        assert (eos_id in allowed) == matcher.may_end
        assert matcher.is_complete == (allowed.tolist() == [eos_id])
        assert all(
            token_id == eos_id or token_id >= NUM_SPECIAL_TOKENS for token_id in allowed[:NUM_SPECIAL_TOKENS].tolist()
        )
        assert allowed[-1] < served.vocabulary.vocab_size
        is_late = len(ids) >= most
        if matcher.may_end and (is_late or rng.random() < 0.1):
            matcher.accept(eos_id)
            assert matcher.is_complete
            return ids
        choices = allowed[allowed != eos_id]
        if choices.size == 0:
            continue
        closing = choices[served.closers[choices]]
        token_id = int(rng.choice(closing if closing.size and (is_late or rng.random() < 0.3) else choices))
        matcher.accept(token_id)
        ids.append(token_id)
    raise AssertionError(f"no end after {MAX_WALK_TOKENS} ids: {served.text(ids)[-200:]!r}")
