"""The questions of the demo checkpoint: read from the TOML files beside this module, checked, and listed in the README.

`python -m tests.demo.questions` rewrites the table in README.md; a unit test compares the two.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from backend.errors import ConfigError, shown

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
TABLE_BEGIN = "<!-- questions: begin (written by python -m tests.demo.questions) -->"
TABLE_END = "<!-- questions: end -->"
LANGUAGE_CODES = ("en", "fr", "de", "zh", "ar")
OFF_TOPIC = "off-topic"

_T = TypeVar("_T")


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question with its only answer: `ask` is trained, `held_out` is evaluated only."""

    id: str
    answer: str
    ask: tuple[str, ...]
    held_out: tuple[str, ...]
    small_talk: bool = False  # "Hello" and the like: no polite words around it


class OffTopic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the demo does not know, and how it says so; `templates` are filled with random words."""

    answer: str
    ask: tuple[str, ...]
    held_out: tuple[str, ...]
    templates: tuple[str, ...] = ()


class Language(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All questions of one language, and the small words that training varies around them."""

    language: str
    polite_prefixes: tuple[str, ...]
    polite_suffixes: tuple[str, ...]
    filler_words: tuple[str, ...]
    questions: tuple[Question, ...]
    off_topic: OffTopic

    def topics(self) -> tuple[Question, ...]:
        """The questions and, as the last one, everything else (id `off-topic`)."""
        rest = Question(OFF_TOPIC, self.off_topic.answer, self.off_topic.ask, self.off_topic.held_out)
        return (*self.questions, rest)


class Dialogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Question ids that are asked one after the other in one conversation."""

    language: str
    turns: tuple[str, ...]


class Conversations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """System prompts that must not change an answer, and the conversations of several turns that are evaluated."""

    system_prompts: tuple[str, ...]
    held_out_system_prompts: tuple[str, ...]
    dialogues: tuple[Dialogue, ...]


@dataclass(frozen=True)
class Example:
    """One phrasing with the answer it must get."""

    language: str
    topic: str
    text: str
    answer: str
    held_out: bool


@dataclass(frozen=True)
class DemoData:
    """All the data of the demo checkpoint."""

    languages: tuple[Language, ...]
    conversations: Conversations

    def examples(self) -> Iterator[Example]:
        """Every phrasing of every language, trained and held out."""
        for language in self.languages:
            for question in language.topics():
                for text in question.ask:
                    yield Example(language.language, question.id, text, question.answer, held_out=False)
                for text in question.held_out:
                    yield Example(language.language, question.id, text, question.answer, held_out=True)

    def question(self, language: str, topic: str) -> Question:
        """The question `topic` of `language`; KeyError when there is none."""
        for candidate in self.languages:
            for question in candidate.topics():
                if (candidate.language, question.id) == (language, topic):
                    return question
        raise KeyError((language, topic))


def normalised(text: str) -> str:
    """`text` without case, punctuation and spaces: two phrasings that agree in this are one."""
    return "".join(character for character in text.casefold() if unicodedata.category(character)[0] in "LMN")


def read_data() -> DemoData:
    """Read and check all TOML files.

    Raises ConfigError for an unknown key, an id or phrasing that occurs twice, or a dialogue that names no question.
    """
    languages = tuple(_read(FOLDER / f"questions_{code}.toml", Language) for code in LANGUAGE_CODES)
    data = DemoData(languages, _read(FOLDER / "conversations.toml", Conversations))
    for language in languages:
        for topic, count in Counter(question.id for question in language.topics()).items():
            if count > 1:
                raise ConfigError(f"{language.language}: id {topic} occurs {count} times, must be unique")
    for (language_name, text), count in Counter((e.language, normalised(e.text)) for e in data.examples()).items():
        if count > 1:
            raise ConfigError(f"{language_name}: phrasing {shown(text)} occurs {count} times, must be unique")
    for dialogue in data.conversations.dialogues:
        for topic in dialogue.turns:
            try:
                data.question(dialogue.language, topic)
            except KeyError as error:
                raise ConfigError(f"conversations.toml: no question {topic} in {dialogue.language}") from error
    return data


def questions_table(data: DemoData) -> str:
    """The Markdown table of the README: per language the first phrasing, the number of phrasings, and the answer."""
    lines = ["| language | question | phrasings | answer |", "|---|---|---|---|"]
    for language in data.languages:
        for question in language.topics():
            asked = "*anything else*" if question.id == OFF_TOPIC else question.ask[0]
            num_phrasings = len(question.ask) + len(question.held_out)
            lines.append(f"| {language.language} | {asked} | {num_phrasings} | {question.answer} |")
    return "\n".join(lines)


def write_table(data: DemoData) -> None:
    """Put the table between its two markers in README.md; ConfigError when a marker is missing."""
    text = README.read_text(encoding="utf-8")
    if TABLE_BEGIN not in text or TABLE_END not in text:
        raise ConfigError(f"{README.name}: the markers {TABLE_BEGIN!r} and {TABLE_END!r} must both be there")
    before, after = text.split(TABLE_BEGIN)[0], text.split(TABLE_END)[1]
    README.write_text(f"{before}{TABLE_BEGIN}\n\n{questions_table(data)}\n\n{TABLE_END}{after}", encoding="utf-8")


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path.name}: {error}") from error


if __name__ == "__main__":
    write_table(read_data())
