from __future__ import annotations

import shutil
from pathlib import Path

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from backend.checkpoint.vocabulary import Vocabulary, read_vocabulary
from backend.text.chat import ChatTemplate
from backend.text.tokenizer import Tokenizer

NEMO_TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"


@pytest.fixture(scope="session")
def nemo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with Mistral NeMo's own vocabulary, as mistral-common ships it."""
    folder = tmp_path_factory.mktemp("nemo")
    shutil.copy(NEMO_TEKKEN, folder / "tekken.json")
    return folder


@pytest.fixture(scope="session")
def vocabulary(nemo_folder: Path) -> Vocabulary:
    return read_vocabulary(nemo_folder)


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    return Tokenizer(vocabulary)


@pytest.fixture(scope="session")
def chat(vocabulary: Vocabulary, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(vocabulary, tokenizer)


@pytest.fixture(scope="session")
def tekkenizer() -> Tekkenizer:
    """The oracle: mistral-common's own tokenizer."""
    return Tekkenizer.from_file(NEMO_TEKKEN)
