"""`/tokenize` and `/detokenize`, as vLLM has them: asked of the models before and behind the engine."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import Field, JsonValue

from client.gateway.chat_request import Tool
from client.gateway.errors import bad_request
from client.gateway.fields import Model, made_tensor
from client.gateway.guides import json_text
from client.gateway.service import ServiceOf, check_key, check_open
from client.params import InputTensor

router = APIRouter(dependencies=[Depends(check_key), Depends(check_open)], tags=["text"])


class TokenizeRequest(Model):
    """Exactly one of `prompt` and `messages`."""

    model: str
    prompt: str | None = None
    add_special_tokens: bool | None = Field(None, description="of a prompt; false: no BOS in front")
    messages: list[dict[str, JsonValue]] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, description="with messages")


class DetokenizeRequest(Model):
    """Ids of a text."""

    model: str
    tokens: list[int] = Field(max_length=2**20)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceOf) -> dict[str, Any]:
    """Ids of a text, or of a chat in its template."""
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt", "exactly one of prompt and messages must be given")
    if body.prompt is not None and body.tools is not None:
        raise bad_request("tools", "need messages")
    if body.messages is not None and body.add_special_tokens is not None:
        raise bad_request("add_special_tokens", "is for a prompt: the template of messages has its own")
    tensors: list[InputTensor] = []
    if body.prompt is not None:
        tensors.append(made_tensor("prompt", "text_input", "BYTES", body.prompt))
    if body.messages is not None:
        tensors.append(made_tensor("messages", "messages", "BYTES", json_text(body.messages)))
    if body.tools:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        tensors.append(made_tensor("tools", "tools", "BYTES", json_text(tools)))
    ids = await service.ensemble.token_ids(tensors, {})
    if body.add_special_tokens is False:
        ids = ids[1:]  # a prompt always gets a BOS in front
    return {"count": len(ids), "tokens": ids, "max_model_len": await max_model_len(service)}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceOf) -> dict[str, str]:
    """Text of ids; control ids have none."""
    service.check_model(body.model)
    if not body.tokens:
        return {"prompt": ""}
    made_tensor("tokens", "token_ids", "INT32", *body.tokens)
    return {"prompt": await service.ensemble.text(body.tokens, {"token_ids": "tokens"})}


async def max_model_len(service: ServiceOf) -> int | None:
    """Most tokens of prompt and answer together, as the engine says; None while it is not there."""
    text = (await service.metrics.engine_info()).get("max_model_len", "")
    found = re.match(r"[\d,]+", text)
    return int(found[0].replace(",", "")) if found else None
