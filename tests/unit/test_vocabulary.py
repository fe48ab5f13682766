from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

from backend.checkpoint.vocabulary import V3_SPECIAL_TOKENS, Vocabulary, read_vocabulary
from backend.errors import ConfigError
from backend.text.tokenizer import Tokenizer
from tests.fuzz.tokenizer_file import ids_and_merges
from tests.unit.text.samples import TEXTS

NEMO_TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
NUM_RANKS = 3_000
SPECIAL_TOKEN = re.compile("|".join([*map(re.escape, V3_SPECIAL_TOKENS), r"<SPECIAL_\d+>"]))
Json = dict[str, Any]


@pytest.fixture(scope="module")
def nemo_text() -> str:
    return NEMO_TEKKEN.read_text()


@pytest.fixture(scope="module")
def cut_text(nemo_text: str) -> str:
    """Mistral NeMo's vocabulary cut after 3,000 ranks, in the official format."""
    tekken = json.loads(nemo_text)
    tekken["vocab"] = tekken["vocab"][:NUM_RANKS]
    tekken["config"] |= {"num_vocab_tokens": NUM_RANKS, "default_vocab_size": NUM_RANKS + 1_000}
    return json.dumps(tekken)


@pytest.fixture(scope="module")
def cut_folder(tmp_path_factory: pytest.TempPathFactory, cut_text: str) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "tekken.json").write_text(cut_text)
    return folder


@pytest.fixture(scope="module")
def cut(cut_folder: Path) -> Vocabulary:
    return read_vocabulary(cut_folder)


@pytest.fixture(scope="module")
def hugging_face(cut: Vocabulary) -> HuggingFaceTokenizer:
    """The same vocabulary as a Hugging Face tokenizer, its merges derived from the ranks."""
    ids, merges = ids_and_merges(cut)
    names = {name: token_id for token_id, name in enumerate(cut.special_tokens)}
    made = HuggingFaceTokenizer(models.BPE(vocab=names | ids, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in cut.special_tokens])
    return made


@pytest.fixture(scope="module")
def hugging_face_text(hugging_face: HuggingFaceTokenizer) -> str:
    text: str = hugging_face.to_str()
    return text


@pytest.fixture(scope="module")
def hugging_face_ids(hugging_face: HuggingFaceTokenizer) -> Callable[[str], list[int]]:
    def ids_of(text: str) -> list[int]:
        ids: list[int] = hugging_face.encode(text).ids
        return ids

    return ids_of


@pytest.fixture(scope="module")
def cut_tokenizer(cut: Vocabulary) -> Tokenizer:
    return Tokenizer(cut)


def test_the_whole_vocabulary_is_mistral_common_s(tmp_path: Path, nemo_text: str) -> None:
    (tmp_path / "tekken.json").write_text(nemo_text)
    vocabulary = read_vocabulary(tmp_path)
    oracle = Tekkenizer.from_file(NEMO_TEKKEN)
    assert vocabulary.vocab_size == oracle.n_words == 131_072
    assert vocabulary.num_special_tokens == oracle.num_special_tokens == 1_000
    assert list(vocabulary.token_bytes) == [oracle.id_to_byte_piece(token_id) for token_id in range(oracle.n_words)]
    assert list(vocabulary.special_tokens) == [oracle.id_to_piece(token_id) for token_id in range(1_000)]
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id) == (oracle.unk_id, oracle.bos_id, oracle.eos_id)
    assert vocabulary.pad_id == oracle.pad_id
    assert vocabulary.tool_calls_id == oracle.get_special_token("[TOOL_CALLS]") == 9
    assert vocabulary.special_id("[SUFFIX]") == 16


def test_repr_is_short(cut: Vocabulary) -> None:
    assert len(repr(cut)) < 200


def test_special_tokens_of_the_file_are_taken(tmp_path: Path, cut_text: str) -> None:
    tekken = json.loads(cut_text)
    names = ["<unk>", "</s>", "<s>", "[TOOL_CALLS]", "<pad>", "[NEW]"]
    tekken["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    tekken["config"]["default_num_special_tokens"] = 8
    (tmp_path / "tekken.json").write_text(json.dumps(tekken | {"multimodal": None}))
    with pytest.raises(ConfigError, match=r"default_vocab_size must be 264 to 3008 .* but is 4000"):
        read_vocabulary(tmp_path)
    tekken["config"]["default_vocab_size"] = 1_000
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary.special_tokens == (*names, "<SPECIAL_6>", "<SPECIAL_7>")
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.tool_calls_id, vocabulary.pad_id) == (2, 1, 3, 4)
    assert vocabulary.vocab_size == 1_000
    assert vocabulary.token_bytes[7:11] == (b"", b"\x00", b"\x01", b"\x02")


def test_tekken_json_is_preferred(tmp_path: Path, cut_text: str, hugging_face_text: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tekken.json").write_text(cut_text)
    assert read_vocabulary(tmp_path).vocab_size == 4_000


@pytest.mark.parametrize("merges", ["pairs", "strings"])
def test_tokenizer_json_is_the_same_vocabulary(
    tmp_path: Path, cut: Vocabulary, hugging_face_text: str, merges: str
) -> None:
    tokenizer = json.loads(hugging_face_text)
    if merges == "strings":  # as files of 2024 have them
        tokenizer["model"]["merges"] = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_vocabulary(tmp_path) == cut


def test_tokenizer_json_as_transformers_writes_it(tmp_path: Path, cut_folder: Path, cut: Vocabulary) -> None:
    convert_tekken_tokenizer(str(cut_folder / "tekken.json")).save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path) == cut


def test_special_tokens_go_by_the_names_of_tokenizer_json(tmp_path: Path, hugging_face_text: str) -> None:
    # Mistral NeMo's own tokenizer.json has <pad> at 10 and the fill-in-the-middle tokens after it.
    moved = hugging_face_text.replace('"[IMG]"', '"[WAS_IMG]"').replace('"<pad>"', '"[IMG]"')
    (tmp_path / "tokenizer.json").write_text(moved.replace('"[WAS_IMG]"', '"<pad>"'))
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary.pad_id == 10
    assert vocabulary.special_id("[IMG]") == 11


@given(text=st.sampled_from(sorted(TEXTS.values())) | st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
@settings(max_examples=200)
def test_hugging_face_gives_the_same_ids(
    cut_tokenizer: Tokenizer, hugging_face_ids: Callable[[str], list[int]], text: str
) -> None:
    text = SPECIAL_TOKEN.sub("", text)  # Hugging Face would find those in the text
    ids = cut_tokenizer.encode(text, add_bos=False)
    assert hugging_face_ids(text) == ids
    assert cut_tokenizer.decode(ids) == text


def _set(*path: str | int, value: Any) -> Callable[[Json], None]:
    def change(file: Json) -> None:
        inner: Any = file
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def _drop(*path: str | int) -> Callable[[Json], None]:
    def change(file: Json) -> None:
        inner: Any = file
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


def _encoded(token: bytes) -> str:
    return base64.b64encode(token).decode()


BAD_TEKKEN: dict[str, tuple[Callable[[Json], None], str]] = {
    "a hole": (_drop("vocab", 500), "num_vocab_tokens is 3000 but vocab has 2999"),
    "a wrong rank": (_set("vocab", 500, "rank", value=501), r"vocab\[500\].rank must be 500 but is 501"),
    "a token twice": (_set("vocab", 2_999, "token_bytes", value=_encoded(b"er")), r"ranks 258 and 2999 .* b'er'"),
    "an empty token": (_set("vocab", 700, "token_bytes", value=""), "rank 700 must have 1 to 1024 bytes but has 0"),
    "a long token": (
        _set("vocab", 700, "token_bytes", value=_encoded(b"a" * 1025)),
        "rank 700 must have 1 to 1024 bytes but has 1025",
    ),
    "bad base64": (_set("vocab", 700, "token_bytes", value="Q?=="), r"base64 .*\$.vocab\[700\].token_bytes"),
    "bytes out of order": (_set("vocab", 65, "token_bytes", value=_encoded(b"B")), "rank 65 must be the byte b'A'"),
    "no rank": (_drop("vocab", 3, "rank"), r"missing required field `rank` - at `\$.vocab\[3\]`"),
    "no vocab": (_drop("vocab"), "missing required field `vocab`"),
    "no config": (_drop("config"), "missing required field `config`"),
    "no pattern": (_drop("config", "pattern"), r"`pattern` - at `\$.config`"),
    "another pattern": (_set("config", "pattern", value="|a"), r"config.pattern is not Tekken's: '\|a'"),
    "another version": (_set("config", "version", value="v7"), "version must be 'v3'.* but is 'v7'"),
    "too small a size": (_set("config", "default_vocab_size", value=1_255), "must be 1256 to 4000 .* but is 1255"),
    "too large a size": (_set("config", "default_vocab_size", value=4_001), "must be 1256 to 4000 .* but is 4001"),
    "a size in words": (_set("config", "default_vocab_size", value="4000"), r"got `str` - at `\$.config.default"),
    "no special tokens": (_set("config", "default_num_special_tokens", value=0), "must be 1 to 100000 but is 0"),
    "countless special tokens": (_set("config", "default_num_special_tokens", value=10**12), "but is 1000000000000"),
    "no tool calls": (
        _set("special_tokens", value=[{"rank": i, "token_str": n} for i, n in enumerate(V3_SPECIAL_TOKENS[:9])]),
        r"no special token is called '<pad>'",
    ),
    "a special rank": (
        _set("special_tokens", value=[{"rank": 1, "token_str": "<s>"}]),
        r"special_tokens\[0\].rank must",
    ),
    "a special token twice": (
        _set("special_tokens", value=[{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "<s>"}]),
        "ids 0 and 1 are the same special token '<s>'",
    ),
    "more special tokens": (
        _set("special_tokens", value=[{"rank": i, "token_str": f"[{i}]"} for i in range(1_001)]),
        "special_tokens has 1001 entries but config.default_num_special_tokens is 1000",
    ),
}


def _swap_merges(file: Json) -> None:
    merges = file["model"]["merges"]
    merges[10], merges[2_000] = merges[2_000], merges[10]


def _rename_token(file: Json) -> None:
    file["model"]["vocab"]["two words"] = file["model"]["vocab"].pop("er")
    file["model"]["merges"] = []


def _use_an_id_twice(file: Json) -> None:
    file["model"]["vocab"] |= {"zzzzzz": 1_300}


def _leave_an_id_out(file: Json) -> None:
    file["model"]["vocab"].pop("er")


def _keep_100_bytes(file: Json) -> None:
    file["model"]["vocab"] = {token: token_id for token, token_id in file["model"]["vocab"].items() if token_id < 1_100}
    file["model"]["merges"] = []


def _name_an_added_token_otherwise(file: Json) -> None:
    file["added_tokens"][4]["content"] = "[END]"


BAD_TOKENIZER: dict[str, tuple[Callable[[Json], None], str]] = {
    "another model": (_set("model", "type", value="Unigram"), "model.type must be 'BPE' but is 'Unigram'"),
    "no model": (_drop("model"), "missing required field `model`"),
    "a normalizer": (_set("normalizer", value={"type": "NFC"}), r"normalizer must be null.*NFC"),
    "another pattern": (
        _set("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value=r"\w+"),
        r"Split pattern of pre_tokenizer is not Tekken's: '\\\\w\+'",
    ),
    "another pre-tokenizer": (_set("pre_tokenizer", value={"type": "Metaspace"}), "pre_tokenizer must be .*Metaspace"),
    "a prefix space": (
        _set("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True),
        "pre_tokenizer must be",
    ),
    "no pre-tokenizer": (_drop("pre_tokenizer"), "missing required field `pre_tokenizer`"),
    "a new token at the end": (
        lambda file: file["added_tokens"].append({"id": 4_000, "content": "<|im_start|>"}),
        r"the 1001 added_tokens must have the ids 0 to 1000 but none has 1000 \(the highest is 4000\)",
    ),
    "an added token twice": (_set("added_tokens", 7, "id", value=8), "ids 0 to 999 but none has 7"),
    "an added token of another name": (_name_an_added_token_otherwise, r"gives '\[/INST\]' the id 4 of another"),
    "an id twice": (_use_an_id_twice, "3001 tokens with only 3000 different ids"),
    "a hole": (_leave_an_id_out, "model.vocab has no token of id 1258"),
    "a long token": (
        _set("model", "vocab", "a" * 1_000_000, value=4_000),
        "tokens of at most 1024 bytes, found 1000000 for id 4000",
    ),
    "an id far away": (_set("model", "vocab", "er", value=10**12), "4000 entries but ids up to 1000000000000"),
    "too few tokens": (_keep_100_bytes, "at least 256 ranks but has 100"),
    "a negative id": (_set("model", "vocab", "er", value=-5_000), "gives 'er' the id -5000"),
    "no byte-level token": (_rename_token, "'two words', which is no byte-level token"),
    "merges out of order": (_swap_merges, r"model.merges\[11\] .* is not in the order of token ids"),
    "a merge of unknown tokens": (_set("model", "merges", 0, value=["Ġ", "€"]), "not all of which is in model.vocab"),
    "a merge without a result": (_set("model", "merges", 0, value="z z"), "'z z', not all of which is in model.vocab"),
    "too few merges": (_drop("model", "merges", 100), "different pairs but the vocabulary has .* copy tekken.json"),
    "a merge twice": (
        lambda file: _set("model", "merges", 7, value=file["model"]["merges"][8])(file),
        "different pairs",
    ),
}


@pytest.mark.parametrize("name", BAD_TEKKEN)
def test_a_damaged_tekken_json_is_refused(tmp_path: Path, cut_text: str, name: str) -> None:
    change, problem = BAD_TEKKEN[name]
    tekken = json.loads(cut_text)
    change(tekken)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(ConfigError, match=rf"tekken\.json: .*{problem}"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("name", BAD_TOKENIZER)
def test_a_tokenizer_json_that_is_not_tekken_is_refused(tmp_path: Path, hugging_face_text: str, name: str) -> None:
    change, problem = BAD_TOKENIZER[name]
    tokenizer = json.loads(hugging_face_text)
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=rf"tokenizer\.json: .*{problem}"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b"\xff\xfe", "malformed"),
        (b'{"config": {"pattern": "\xff"}, "model": {}, "added_tokens": [{"content": "\xff"}]}', "utf-8|UTF-8"),
        (b'{"a":' * 100_000, "recursion"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
    ],
)
@pytest.mark.parametrize("file_name", ["tekken.json", "tokenizer.json"])
def test_files_that_are_no_such_json_are_refused(tmp_path: Path, file_name: str, content: bytes, problem: str) -> None:
    (tmp_path / file_name).write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_vocabulary(tmp_path)
    assert str(tmp_path / file_name) in str(caught.value)


@pytest.mark.parametrize(
    ("file_name", "problem"),
    [
        ("tokenizer.model", "tokenizer.model is a SentencePiece tokenizer, .* copy tekken.json"),
        ("tokenizer.model.v3", "tokenizer.model.v3 is a SentencePiece tokenizer"),
        ("vocab.txt", "has no tokenizer; it needs tekken.json or tokenizer.json"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path, file_name: str, problem: str) -> None:
    (tmp_path / file_name).write_bytes(b"")
    with pytest.raises(ConfigError, match=problem):
        read_vocabulary(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        read_vocabulary(tmp_path / "nowhere")


def test_an_unknown_special_token_is_refused(cut: Vocabulary) -> None:
    with pytest.raises(ConfigError, match=r"no special token is called '\[THINK\]'"):
        cut.special_id("[THINK]")
