"""Chat messages and tools to token ids: mistral-common's validation and its template V3-Tekken on our vocabulary.

Importing this takes about 0.3 s (mistral-common with pydantic, jsonschema, PIL and requests), so only the model that
templates prompts should; nothing here opens a connection or a file.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.protocol.instruct.chunk import ContentChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import Tokenized, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3

from backend.checkpoint.vocabulary import Vocabulary
from backend.errors import RequestError
from backend.text.messages import (
    AssistantTurn,
    Content,
    ToolDefinition,
    ToolTurn,
    Turn,
    UserTurn,
    parse_messages,
    parse_tools,
    unusable,
)
from backend.text.template_tokenizer import TemplateTokenizer
from backend.text.tokenizer import Tokenizer

_Template = InstructTokenizerV3[InstructRequest[Any, Any], FIMRequest, Tokenized]
_Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage

_CALL_ID_LENGTH = 9
_CALL_ID_ALPHABET = string.digits + string.ascii_letters
_CALL_ID = re.compile(f"[a-zA-Z0-9]{{{_CALL_ID_LENGTH}}}")


class ChatTemplate:
    """Makes the prompt of a chat. Immutable, so threads may share it.

    `tokenizer`, if there is already one of this vocabulary, saves making another.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: Tokenizer | None = None) -> None:
        self._validator = get_validator(TokenizerVersion.v3, mode=ValidationMode.serving)
        self._normalizer = get_normalizer(TokenizerVersion.v3)
        self._template: _Template = InstructTokenizerV3(TemplateTokenizer(tokenizer or Tokenizer(vocabulary)))

    def encode(self, messages_json: str, tools_json: str | None) -> list[int]:
        """Turn OpenAI-style messages and tools, each a JSON list, into the ids of a prompt (with one BOS, in front).

        The system prompt and the tools stand in the last user turn. Tool-call ids that the template does not allow (it
        wants nine letters or digits) are replaced, equal ones by equal ones. RequestError("messages" or "tools", ...)
        for everything that is wrong with them.
        """
        turns = parse_messages(messages_json)
        tools = [_tool(tool) for tool in parse_tools(tools_json)] if tools_json is not None else []
        call_ids = template_call_ids(_call_ids(turns))
        with _blaming("messages"):
            request = ChatCompletionRequest(
                model="mistral-nemo",  # required when serving, appears nowhere
                messages=[_message(turn, call_ids) for turn in turns],
            )
            self._validator.validate_request(request)
        if tools:
            with _blaming("tools"):
                request.tools = tools
                self._validator.validate_request(request)
        with _blaming("messages"):
            instruction = self._normalizer.from_chat_completion_request(request)
            return self._template.encode_instruct(instruction).tokens


@contextmanager
def _blaming(field: str) -> Iterator[None]:
    """Turn what mistral-common, pydantic, jsonschema, json and re raise for bad input into RequestErrors of a field."""
    try:
        yield
    except MistralCommonException as error:
        raise unusable(field, error.message) from error
    except RecursionError as error:  # JSON inside the strings of tool calls and results, regular expressions in tools
        raise RequestError(field, "holds JSON or a regular expression that is nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise unusable(field, str(error)) from error


def template_call_ids(call_ids: Iterable[str]) -> dict[str, str]:
    """Give each tool-call id one of nine letters or digits: itself if it is one, else one made from its hash.

    Different ids stay different. An id gets the same replacement in every request (unless that is taken there), so that
    the turns of a growing chat keep their prefix.
    """
    distinct = dict.fromkeys(call_ids)
    chosen = {call_id: call_id for call_id in distinct if _CALL_ID.fullmatch(call_id)}
    taken = set(chosen)
    for call_id in distinct:
        attempt = 0
        while call_id not in chosen:
            candidate = _hashed_id(call_id, attempt)
            attempt += 1
            if candidate not in taken:
                chosen[call_id] = candidate
                taken.add(candidate)
    return chosen


def _hashed_id(call_id: str, attempt: int) -> str:
    number = int.from_bytes(hashlib.sha256(f"{attempt} {call_id}".encode()).digest(), "big")
    characters = []
    for _ in range(_CALL_ID_LENGTH):
        number, index = divmod(number, len(_CALL_ID_ALPHABET))
        characters.append(_CALL_ID_ALPHABET[index])
    return "".join(characters)


def _call_ids(turns: Sequence[Turn]) -> list[str]:
    call_ids: list[str] = []
    for turn in turns:
        if isinstance(turn, AssistantTurn):
            call_ids += [call.id for call in turn.tool_calls or ()]
        elif isinstance(turn, ToolTurn):
            call_ids.append(turn.tool_call_id)
    return call_ids


def _message(turn: Turn, call_ids: dict[str, str]) -> _Message:
    if isinstance(turn, UserTurn):
        return UserMessage(content=_content(turn.content))
    if isinstance(turn, AssistantTurn):
        calls = [
            ToolCall(
                id=call_ids[call.id],
                # NOTE: an object becomes a string in pydantic's validation of `arguments`.
                function=FunctionCall.model_validate(
                    {"name": call.function.name, "arguments": call.function.arguments}
                ),
            )
            for call in turn.tool_calls or ()
        ]
        content = None if turn.content is None else _content(turn.content)
        return AssistantMessage(content=content, tool_calls=calls or None, prefix=turn.prefix)
    if isinstance(turn, ToolTurn):
        return ToolMessage(content=_content(turn.content), tool_call_id=call_ids[turn.tool_call_id], name=turn.name)
    return SystemMessage(content=_content(turn.content))


def _content(content: Content) -> str | list[ContentChunk]:
    if isinstance(content, str):
        return content
    return [TextChunk(text=part.text) for part in content]


def _tool(tool: ToolDefinition) -> Tool:
    function = tool.function
    return Tool(
        function=Function(
            name=function.name, description=function.description or "", parameters=function.parameters or {}
        )
    )
