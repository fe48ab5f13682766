from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.checkpoint.vocabulary import Vocabulary
from backend.text.detokenizer import cut_text
from backend.text.tokenizer import Tokenizer
from tests.unit.text.samples import TEXTS

TOKEN_BYTES = [b"", b"Hello", b" wor", b"ld", "€".encode()[:2], "€".encode()[2:]]


@pytest.mark.parametrize(
    ("text_ids", "skip_bytes", "take_bytes", "text"),
    [
        ([], 0, 0, ""),
        ([0], 0, 0, ""),
        ([1, 2, 3], 0, 11, "Hello world"),
        ([1, 2, 3], 0, 5, "Hello"),
        ([1, 2, 3], 5, 6, " world"),
        ([1, 0, 2, 3, 0], 4, 3, "o w"),
        ([4, 5], 0, 3, "€"),
        ([1, 4, 5], 5, 3, "€"),
        ([4, 5], 0, 2, "\ufffd"),
        ([4, 5], 1, 2, "\ufffd\ufffd"),
        ([1, 2], 9, 0, ""),
    ],
)
def test_cuts(text_ids: list[int], skip_bytes: int, take_bytes: int, text: str) -> None:
    assert cut_text(TOKEN_BYTES, text_ids, skip_bytes, take_bytes) == text


@pytest.mark.parametrize(
    ("text_ids", "skip_bytes", "take_bytes", "problem"),
    [
        ([1], 0, 6, "hold 5 bytes, fewer than .* = 6"),
        ([1], 6, 0, "hold 5 bytes, fewer than .* = 6"),
        ([], 0, 1, "hold 0 bytes"),
        ([1, 6], 0, 1, "must be 0 to 5 but one is 6"),
        ([-1], 0, 1, "must be 0 to 5 but one is -1"),
        ([1], -1, 2, ">= 0 but are -1 and 2"),
        ([1], 2, -1, ">= 0 but are 2 and -1"),
    ],
)
def test_refusals(text_ids: list[int], skip_bytes: int, take_bytes: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        cut_text(TOKEN_BYTES, text_ids, skip_bytes, take_bytes)


@given(data=st.data(), name=st.sampled_from(sorted(TEXTS)))
@settings(max_examples=150)
def test_cuts_at_characters_join_to_the_text(
    vocabulary: Vocabulary, tokenizer: Tokenizer, data: st.DataObject, name: str
) -> None:
    text = TEXTS[name]
    ids = tokenizer.encode(text, add_bos=True)
    cut = data.draw(st.integers(0, len(text)))
    num_bytes, num_all_bytes = len(text[:cut].encode()), len(text.encode())
    assert cut_text(vocabulary.token_bytes, ids, 0, num_bytes) == text[:cut]
    assert cut_text(vocabulary.token_bytes, ids, num_bytes, num_all_bytes - num_bytes) == text[cut:]
