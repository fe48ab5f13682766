from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from backend.text.template_tokenizer import TemplateTokenizer
from backend.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def adapted(tokenizer: Tokenizer) -> TemplateTokenizer:
    return TemplateTokenizer(tokenizer)


def test_it_says_what_mistral_common_s_own_says(adapted: TemplateTokenizer, tekkenizer: Tekkenizer) -> None:
    for name in ("n_words", "num_special_tokens", "special_ids", "bos_id", "eos_id", "pad_id", "unk_id", "version"):
        assert getattr(adapted, name) == getattr(tekkenizer, name), name
    assert adapted.model_settings_builder is None
    assert adapted.vocab() == tekkenizer.vocab()
    for token in (0, 999, 1_000, -1, "[INST]", "INST"):
        assert adapted.is_special(token) == tekkenizer.is_special(token), token
    with pytest.raises(ValueError, match="in memory"):
        _ = adapted.file_path


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_encode(adapted: TemplateTokenizer, tekkenizer: Tekkenizer, bos: bool, eos: bool) -> None:
    assert adapted.encode("Hello [INST] é", bos, eos) == tekkenizer.encode("Hello [INST] é", bos, eos)


@given(ids=st.lists(st.integers(0, 20) | st.integers(1_000, 131_071), max_size=20))
@settings(max_examples=100)
def test_decode(adapted: TemplateTokenizer, tekkenizer: Tekkenizer, ids: list[int]) -> None:
    for policy in (SpecialTokenPolicy.IGNORE, SpecialTokenPolicy.KEEP):
        assert adapted.decode(ids, policy) == tekkenizer.decode(ids, policy)


def test_decode_refuses_special_tokens_when_asked(adapted: TemplateTokenizer) -> None:
    assert adapted.decode([5_000], SpecialTokenPolicy.RAISE) == adapted.decode([5_000])
    with pytest.raises(ValueError, match="must not be special but 3 is"):
        adapted.decode([5_000, 3], SpecialTokenPolicy.RAISE)
