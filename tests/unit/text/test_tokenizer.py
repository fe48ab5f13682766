from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from backend.checkpoint.vocabulary import Vocabulary
from backend.errors import ConfigError, RequestError
from backend.text.tokenizer import MAX_BLANK_RUN, Tokenizer
from tests.unit.text.samples import LONG_TEXTS, OTHERS, TEXTS

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
# Dense in what the pattern treats specially: cases, marks, digits, line ends, blanks, slashes.
TRICKY = st.text(
    st.sampled_from(list("aBéǅʰ中م\u0301\u0e31١½ \t\r\n\u00a0\u3000'/-.[]<>_😀\u200d\x00\x85")), max_size=60
)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_mistral_common(tokenizer: Tokenizer, tekkenizer: Tekkenizer, name: str) -> None:
    text = TEXTS[name]
    for add_bos in (False, True):
        assert tokenizer.encode(text, add_bos=add_bos) == tekkenizer.encode(text, bos=add_bos, eos=False)
    assert tokenizer.decode(tokenizer.encode(text, add_bos=True)) == text


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_long_texts_have_the_same_ids(tokenizer: Tokenizer, tekkenizer: Tekkenizer, name: str) -> None:
    text = LONG_TEXTS[name]
    assert len(text.encode()) >= 98_000
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == tekkenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ids) == text


@given(text=UNICODE | TRICKY)
@settings(max_examples=300)
def test_any_text_comes_back_and_has_the_same_ids(tokenizer: Tokenizer, tekkenizer: Tekkenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == tekkenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(0, 131_071) | st.integers(990, 1_300), max_size=40))
@settings(max_examples=200)
def test_any_ids_decode_as_in_mistral_common(tokenizer: Tokenizer, tekkenizer: Tekkenizer, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == tekkenizer.decode(ids)


def test_a_special_token_ends_an_unfinished_character(tokenizer: Tokenizer) -> None:
    first, second, third = (1000 + byte for byte in "€".encode())
    assert tokenizer.decode([first, second, third]) == "€"
    assert tokenizer.decode([first, second, tokenizer.eos_id, third]) == "\ufffd\ufffd"


def test_control_tokens_typed_as_text_stay_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(OTHERS["specials"], add_bos=False)
    assert min(ids) >= tokenizer.vocabulary.num_special_tokens


def test_bos_and_eos(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("", add_bos=True) == [1]


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("abc\udfff", 3), ("né\ud83d\ude00", 2)])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str, position: int) -> None:
    with pytest.raises(RequestError, match=rf"^text_input: .* U\+D.* at character {position}$"):
        tokenizer.encode(text, add_bos=True)


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000"])
def test_runs_of_blanks_have_a_limit(tokenizer: Tokenizer, blank: str) -> None:
    assert len(tokenizer.encode(blank * MAX_BLANK_RUN, add_bos=False)) > 1
    with pytest.raises(
        RequestError, match=rf"at most {MAX_BLANK_RUN} blanks .* has {MAX_BLANK_RUN + 1} at character 1"
    ):
        tokenizer.encode("x" + blank * (MAX_BLANK_RUN + 1), add_bos=False)
    assert tokenizer.encode((blank * 1_000 + "\n") * 1_000, add_bos=False)


@pytest.mark.parametrize("letter", ["a", "A", "中", "\u0301", "\n", "^"])
def test_time_does_not_grow_with_the_square(tokenizer: Tokenizer, letter: str) -> None:
    start = time.perf_counter()
    tokenizer.encode(letter * 1_000_000, add_bos=False)
    assert time.perf_counter() - start < 10  # 0.05 to 0.3 s; the square of 100 KB's 10 ms would be minutes


@pytest.mark.parametrize("token_id", [-1, 131_072, 2**40])
def test_decoding_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(RequestError, match=f"^token_ids: must be 0 to 131071 but one is {token_id}$"):
        tokenizer.decode([5000, token_id])


def test_an_unusable_pattern_is_a_config_error(vocabulary: Vocabulary) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        Tokenizer(dataclasses.replace(vocabulary, pattern="(unclosed"))


def test_from_checkpoint(nemo_folder: Path, tokenizer: Tokenizer) -> None:
    assert Tokenizer.from_checkpoint(nemo_folder).vocabulary == tokenizer.vocabulary


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("backend.text.tokenizer", "torch transformers mistral_common requests numpy"),
        ("backend.text.detokenizer", "torch transformers mistral_common requests numpy tiktoken msgspec"),
        ("backend.text.chat", "torch transformers huggingface_hub soundfile cv2"),
    ],
)
def test_imports_bring_nothing_heavy(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; print([name for name in {unwanted.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
