"""Conversations as token ids: what the model is trained on, and what it is asked.

    chat   <s>[INST]question[/INST]answer</s>[INST]system prompt, empty line, question[/INST]answer</s>
    raw    <s>question answer</s>                 (for clients that send plain text without a template)

`prompt` goes through mistral-common, the owner of the V3-Tekken template. `chat` puts the same ids together itself,
which is faster and knows where the answers are; a unit test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

UNK_ID, BOS_ID, EOS_ID, BEGIN_INST_ID, END_INST_ID, PAD_ID = 0, 1, 2, 3, 4, 11


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class TrainingRow:
    """Token ids of one conversation; `is_answer[i]` says whether `ids[i]` is to be learned."""

    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]


class ChatTokens:
    """Turns conversations into token ids with the Tekken file of a checkpoint."""

    def __init__(self, tekken: Path) -> None:
        self._mistral = MistralTokenizer.from_file(str(tekken))
        self._tekken = self._mistral.instruct_tokenizer.tokenizer
        self.encode = lru_cache(maxsize=65536)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tekken.encode(text, bos=False, eos=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without the text of control tokens."""
        return self._tekken.decode(list(ids))

    def prompt(self, earlier: Sequence[Turn], question: str, system_prompt: str | None = None) -> list[int]:
        """Ids of a chat up to the last [/INST], by mistral-common."""
        messages: list[SystemMessage | UserMessage | AssistantMessage] = []
        if system_prompt is not None:
            messages.append(SystemMessage(content=system_prompt))
        for turn in earlier:
            messages += [UserMessage(content=turn.question), AssistantMessage(content=turn.answer)]
        messages.append(UserMessage(content=question))
        request: ChatCompletionRequest[SystemMessage | UserMessage | AssistantMessage]
        request = ChatCompletionRequest(messages=messages)
        return list(self._mistral.encode_chat_completion(request).tokens)

    def chat(self, turns: Sequence[Turn], system_prompt: str | None = None) -> TrainingRow:
        """The whole chat with its answers marked; the template puts the system prompt before the last question."""
        ids, is_answer = [BOS_ID], [False]
        for turn in turns:
            in_front = system_prompt is not None and turn is turns[-1]
            question = f"{system_prompt}\n\n{turn.question}" if in_front else turn.question
            asked = (BEGIN_INST_ID, *self._encode(question), END_INST_ID)
            answered = (*self.encode(turn.answer), EOS_ID)
            ids += [*asked, *answered]
            is_answer += [False] * len(asked) + [True] * len(answered)
        return TrainingRow(tuple(ids), tuple(is_answer))

    def raw_prompt(self, question: str) -> tuple[int, ...]:
        """Ids of a question without a template."""
        return (BOS_ID, *self._encode(question))

    def raw(self, turn: Turn) -> TrainingRow:
        """A question without a template and its answer, which begins with a space."""
        asked = self.raw_prompt(turn.question)
        answered = (*self.encode(f" {turn.answer}"), EOS_ID)
        return TrainingRow((*asked, *answered), (False,) * len(asked) + (True,) * len(answered))
