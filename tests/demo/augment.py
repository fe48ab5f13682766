"""Small variations of a question, so that the demo understands more than the phrasings in its files.

Case, punctuation, polite words in front and behind, a missing filler word, a typing error; and for everything that the
demo does not know, sentences of random words. Conversations are drawn here as well: one to four turns, now and then a
system prompt or plain text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from tests.demo.conversation import ChatTokens, TrainingRow, Turn
from tests.demo.questions import OFF_TOPIC, DemoData, Language, Question, normalised

_END_MARKS = "?？.。!！؟ "


@dataclass(frozen=True)
class Chances:
    """How often each variation is drawn, as probabilities."""

    off_topic: float = 0.20  # of all questions; the class is the widest
    other_language: float = 0.33
    template: float = 0.35  # of the off-topic questions
    lower_case: float = 0.25
    upper_case: float = 0.03
    other_end_mark: float = 0.40
    polite_prefix: float = 0.20
    polite_suffix: float = 0.06
    drop_filler: float = 0.15
    typing_error: float = 0.12
    system_prompt: float = 0.15
    raw: float = 0.12


class Augmenter:
    """Draws training conversations without end, the same ones for the same seed."""

    def __init__(self, data: DemoData, tokens: ChatTokens, words: tuple[str, ...], seed: int) -> None:
        self._data, self._tokens, self._words = data, tokens, words
        self._random = Random(seed)
        self._chances = Chances()

    def row(self) -> TrainingRow:
        """One conversation as token ids."""
        random, chances = self._random, self._chances
        if random.random() < chances.raw:
            return self._tokens.raw(self._turn(self._language()))
        language = self._language()
        turns = [self._turn(language) for _ in range(random.choices((1, 2, 3, 4), weights=(4, 3, 2, 1))[0])]
        system_prompt = None
        if random.random() < chances.system_prompt:
            system_prompt = random.choice(self._data.conversations.system_prompts)
        return self._tokens.chat(turns, system_prompt)

    def _language(self) -> Language:
        if self._random.random() < self._chances.other_language:
            return self._random.choice(self._data.languages[1:])
        return self._data.languages[0]

    def _turn(self, language: Language) -> Turn:
        random, topics = self._random, language.topics()
        if random.random() < self._chances.off_topic:
            question = topics[-1]
            if language.off_topic.templates and random.random() < self._chances.template:
                template = random.choice(language.off_topic.templates)
                text = re.sub(r"\{w\}", lambda _: self._word(), template)
                return Turn(self.vary(text, question, language), question.answer)
        else:
            question = random.choice(language.questions)
        return Turn(self.vary(random.choice(question.ask), question, language), question.answer)

    def _word(self) -> str:
        # Half of them are made of two words: what is made of several tokens must not surprise either.
        first = self._random.choice(self._words)
        return first if self._random.random() < 0.5 else first[:4] + self._random.choice(self._words)

    def vary(self, text: str, question: Question, language: Language) -> str:
        """`text` as another person might type it."""
        random, chances = self._random, self._chances
        if random.random() < chances.drop_filler:
            text = _without_one(text, language.filler_words, random)
        if random.random() < chances.typing_error:
            text = _with_typing_error(text, random)
        if random.random() < chances.other_end_mark:
            text = text.rstrip(_END_MARKS) + random.choice(("", "", "?", ".", "!", " ?", "??"))
        if not question.small_talk:
            if random.random() < chances.polite_suffix:
                text = text.rstrip(_END_MARKS) + random.choice(language.polite_suffixes)
            if random.random() < chances.polite_prefix:
                first = text[:1].lower() if random.random() < 0.6 else text[:1]
                text = random.choice(language.polite_prefixes) + first + text[1:]
        if random.random() < chances.lower_case:
            return text.lower()
        return text.upper() if random.random() < chances.upper_case else text


def unrelated_words(data: DemoData, token_texts: list[str]) -> tuple[str, ...]:
    """Lower-case words of the vocabulary that no trained or held-out question uses, to fill the off-topic templates."""
    used: set[str] = set()
    for example in data.examples():
        if example.topic != OFF_TOPIC:
            used.update(normalised(word) for word in re.split(r"[\s'-]+", example.text))
    found = {text[1:] for text in token_texts if re.fullmatch(r" [a-z]{4,}", text)}
    return tuple(sorted(found - used))


def _without_one(text: str, fillers: tuple[str, ...], random: Random) -> str:
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word.lower() in fillers]
    if not places or len(words) < 4:
        return text
    del words[random.choice(places)]
    return " ".join(words)


def _with_typing_error(text: str, random: Random) -> str:
    if len(text) < 8:
        return text
    place = random.randrange(1, len(text) - 2)
    swapped = text[place + 1] + text[place]
    return (
        text[:place] + random.choice((text[place + 1], swapped, text[place] * 2 + text[place + 1])) + text[place + 2 :]
    )
