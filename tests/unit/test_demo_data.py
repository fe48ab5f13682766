"""The demo checkpoint's data, its README and its files agree; training itself is not run here."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from random import Random

import msgspec
import pytest
import torch
from safetensors import safe_open
from transformers import MistralForCausalLM

from backend.errors import ConfigError
from tests.demo import questions as questions_module
from tests.demo import train as train_module
from tests.demo.augment import Augmenter, unrelated_words
from tests.demo.conversation import EOS_ID, ChatTokens, Turn
from tests.demo.evaluate import CHECKPOINT, Case, generate, grade, load_model, scores
from tests.demo.make_tekken import NUM_SPECIAL_TOKENS, SOURCE, VOCAB_SIZE, cut_tekken
from tests.demo.questions import (
    FOLDER,
    OFF_TOPIC,
    README,
    TABLE_BEGIN,
    TABLE_END,
    DemoData,
    normalised,
    questions_table,
    read_data,
)
from tests.demo.train import MIN_HELD_OUT_SHARE, MIN_TRAINED_SHARE, Recipe, demo_config, learning_rate

SIZE_LIMIT_BYTES = 12_000_000
LAYER_SHAPES = {
    "input_layernorm.weight": [256],
    "mlp.down_proj.weight": [256, 768],
    "mlp.gate_proj.weight": [768, 256],
    "mlp.up_proj.weight": [768, 256],
    "post_attention_layernorm.weight": [256],
    "self_attn.k_proj.weight": [128, 256],
    "self_attn.o_proj.weight": [256, 512],
    "self_attn.q_proj.weight": [512, 256],
    "self_attn.v_proj.weight": [128, 256],
}
SHAPES = {
    "lm_head.weight": [4096, 256],
    "model.embed_tokens.weight": [4096, 256],
    "model.norm.weight": [256],
    **{f"model.layers.{layer}.{name}": shape for layer in range(4) for name, shape in LAYER_SHAPES.items()},
}


@pytest.fixture(scope="module")
def data() -> DemoData:
    return read_data()


@pytest.fixture(scope="module")
def tokens() -> ChatTokens:
    return ChatTokens(CHECKPOINT / "tekken.json")


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    return load_model(CHECKPOINT)


def test_every_question_has_enough_phrasings_and_some_are_held_out(data: DemoData) -> None:
    assert [language.language for language in data.languages] == ["English", "French", "German", "Chinese", "Arabic"]
    assert len(data.languages[0].questions) >= 40
    for language in data.languages:
        least = 6 if language.language == "English" else 3
        for question in language.topics():
            assert len(question.ask) >= least, question.id
            assert 1 <= len(question.held_out) <= len(question.ask), question.id
    assert len(data.languages[0].off_topic.ask) >= 60


def test_a_phrasing_has_one_answer_and_held_out_ones_are_never_trained(data: DemoData) -> None:
    examples = list(data.examples())
    answer_of: dict[str, str] = {}
    for example in examples:
        assert answer_of.setdefault(normalised(example.text), example.answer) == example.answer, example.text
    trained = {normalised(example.text) for example in examples if not example.held_out}
    held_out = {normalised(example.text) for example in examples if example.held_out}
    assert len(held_out) >= 150
    assert trained.isdisjoint(held_out)


def test_answers_are_one_to_three_sentences(data: DemoData) -> None:
    for language in data.languages:
        for question in language.topics():
            assert 5 <= len(question.answer) <= 220, question.id
            assert "\n" not in question.answer
            assert question.answer.rstrip("\"'")[-1] in ".?!。", question.id


def test_answers_and_questions_survive_the_cut_vocabulary(data: DemoData, tokens: ChatTokens) -> None:
    for text in chain.from_iterable((example.text, example.answer) for example in data.examples()):
        ids = tokens.encode(text)
        assert all(NUM_SPECIAL_TOKENS <= i < VOCAB_SIZE for i in ids), text
        assert tokens.decode(ids) == text


def test_own_chat_ids_are_those_of_mistral_common(data: DemoData, tokens: ChatTokens) -> None:
    for dialogue in data.conversations.dialogues:
        questions = [data.question(dialogue.language, topic) for topic in dialogue.turns]
        turns = [Turn(question.ask[0], question.answer) for question in questions]
        for system_prompt in (None, "Be polite."):
            row = tokens.chat(turns, system_prompt)
            num_last = len(tokens.encode(turns[-1].answer)) + 1
            assert list(row.ids[:-num_last]) == tokens.prompt(turns[:-1], turns[-1].question, system_prompt)
            learned = [i for i, is_answer in zip(row.ids, row.is_answer, strict=True) if is_answer]
            assert learned == [i for turn in turns for i in (*tokens.encode(turn.answer), EOS_ID)]


def test_tekken_file_is_the_first_ranks_of_the_official_one() -> None:
    text = (CHECKPOINT / "tekken.json").read_text(encoding="utf-8")
    assert text == cut_tekken()
    cut, full = json.loads(text), json.loads(SOURCE.read_text(encoding="utf-8"))
    assert cut["vocab"] == full["vocab"][: VOCAB_SIZE - NUM_SPECIAL_TOKENS]
    assert cut["config"] == {**full["config"], "num_vocab_tokens": 3096, "default_vocab_size": 4096}


@pytest.mark.parametrize("vocab_size", [1000, 1255, 151_001])
def test_a_vocabulary_that_cannot_be_cut_is_refused(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"256\.\.150000, found {vocab_size - 1000}"):
        cut_tekken(vocab_size=vocab_size)


def test_readme_table_is_the_data(data: DemoData) -> None:
    text = README.read_text(encoding="utf-8")
    written = text.split(TABLE_BEGIN)[1].split(TABLE_END)[0].strip()
    assert written == questions_table(data), "run python -m tests.demo.questions"


def test_a_phrasing_that_occurs_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in FOLDER.glob("*.toml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    english = tmp_path / "questions_en.toml"
    english.write_text(english.read_text(encoding="utf-8").replace('"Hi there"', '"make SERVE!"'), encoding="utf-8")
    monkeypatch.setattr(questions_module, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="English: phrasing 'makeserve' occurs 2 times"):
        read_data()


def test_an_unknown_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "questions_en.toml").write_text('language = "English"\nanwser = "?"\n', encoding="utf-8")
    monkeypatch.setattr(questions_module, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=r"questions_en\.toml: .*anwser"):
        read_data()


def test_augmentation_is_the_same_for_the_same_seed_and_keeps_answers(data: DemoData, tokens: ChatTokens) -> None:
    words = unrelated_words(data, [tokens.decode([i]) for i in range(NUM_SPECIAL_TOKENS, VOCAB_SIZE)])
    assert len(words) >= 100
    assert {"model", "error", "position"}.isdisjoint(words)
    first, second = (Augmenter(data, tokens, words, seed=7) for _ in range(2))
    rows = [first.row() for _ in range(300)]
    assert rows == [second.row() for _ in range(300)]
    assert len(set(rows)) > 290
    answers = {example.answer for example in data.examples()}
    for row in rows:
        learned = tokens.decode(
            [i if i != EOS_ID else tokens.encode("\n")[0] for i in _learned(row.ids, row.is_answer)]
        )
        assert {line.strip() for line in learned.strip().split("\n")} <= answers


def _learned(ids: tuple[int, ...], is_answer: tuple[bool, ...]) -> list[int]:
    return [i for i, learned in zip(ids, is_answer, strict=True) if learned]


def test_learning_rate_rises_to_the_peak_and_falls_to_a_hundredth() -> None:
    recipe = Recipe()
    rates = [learning_rate(step, recipe) for step in range(1, recipe.num_steps + 1)]
    assert max(rates) == rates[recipe.warmup_steps - 1] == recipe.peak_learning_rate
    assert rates[-1] == pytest.approx(recipe.peak_learning_rate / 100)


def test_a_model_that_answers_badly_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: ChatTokens
) -> None:
    prompt = tuple(tokens.prompt([], "Hello"))
    cases = [Case(kind, "Hello", prompt, "Hi!") for kind in ("trained", "held_out")]
    monkeypatch.setattr(train_module, "train", lambda *_: 9.0)  # leaves the random weights as they are
    monkeypatch.setattr(train_module, "all_cases", lambda *_: cases)
    monkeypatch.setattr("sys.argv", ["train", "--output", str(tmp_path / "checkpoint")])
    assert train_module.main() == 1
    assert "not written: 98% of trained" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_config_is_the_documented_shape() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["rope_parameters"]["rope_theta"] == 1e6
    assert config["dtype"] == "bfloat16"
    assert config["sliding_window"] is None
    wanted = demo_config().to_dict()
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
    ):
        assert config[key] == wanted[key], key
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "hidden_act"):
        assert config[key] == wanted[key], key
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text(encoding="utf-8"))
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_weights_have_the_documented_shapes_in_bf16() -> None:
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == 5_769_472


def test_the_folder_is_small_and_complete() -> None:
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tekken.json", "training.json"}
    size_bytes = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert size_bytes < SIZE_LIMIT_BYTES


def test_training_report_passes_its_own_gates_for_this_data(data: DemoData) -> None:
    report = json.loads((CHECKPOINT / "training.json").read_text(encoding="utf-8"))
    answered = report["answered_exactly"]
    assert answered["trained"]["share"] >= MIN_TRAINED_SHARE
    assert answered["held_out"]["share"] >= MIN_HELD_OUT_SHARE
    assert msgspec.convert(report["recipe"], Recipe) == Recipe()
    on_topic = [example for example in data.examples() if example.topic != OFF_TOPIC]
    # Questions that were added or removed since make the shipped checkpoint out of date.
    assert answered["trained"]["num_asked"] == sum(not example.held_out for example in on_topic)
    assert answered["held_out"]["num_asked"] == sum(example.held_out for example in on_topic)


def test_readme_shows_the_scores_of_the_training_report() -> None:
    report = json.loads((CHECKPOINT / "training.json").read_text(encoding="utf-8"))
    shown = re.findall(r"\| (\d+) of (\d+) \|", README.read_text(encoding="utf-8"))
    scored = report["answered_exactly"].values()
    assert shown == [(str(score["num_right"]), str(score["num_asked"])) for score in scored]


@pytest.mark.parametrize(
    ("language", "topic"), [("English", "context-length"), ("Chinese", "licence"), ("English", OFF_TOPIC)]
)
def test_the_checkpoint_answers(
    data: DemoData, tokens: ChatTokens, model: MistralForCausalLM, language: str, topic: str
) -> None:
    question = data.question(language, topic)
    case = Case("trained", question.ask[0], tuple(tokens.prompt([], question.ask[0])), question.answer)
    assert generate(model, tokens, case) == question.answer


def test_the_checkpoint_answers_every_question_of_the_readme_safely(
    data: DemoData, tokens: ChatTokens, model: MistralForCausalLM
) -> None:
    asked = [(question.ask[0], question.answer) for language in data.languages for question in language.topics()]
    cases = [Case("trained", text, tuple(tokens.prompt([], text)), answer) for text, answer in asked]
    # Rounding in another order moves logits by far less than 0.1.
    assert [graded.case.asked for graded in grade(model, tokens, cases) if graded.margin < 0.5] == []


def test_grades_agree_with_decoding(data: DemoData, tokens: ChatTokens, model: MistralForCausalLM) -> None:
    examples = Random(5).sample(list(data.examples()), 12)
    right = [Case("right", e.text, tuple(tokens.prompt([], e.text)), e.answer) for e in examples]
    wrong = [Case("wrong", case.asked, case.prompt, f"{case.expected} Really!") for case in right]
    grades = grade(model, tokens, [*right, *wrong])
    for graded in grades[:4]:
        assert (generate(model, tokens, graded.case) == graded.case.expected) == graded.is_right
    found = scores(grades)
    assert found["right"].num_right >= 10
    assert (found["wrong"].num_right, found["wrong"].num_asked) == (0, 12)
