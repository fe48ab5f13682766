"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from client.gateway.chat_request import ChatRequest, plan_chat
from client.gateway.chat_response import ChatAnswer
from client.gateway.completion_request import CompletionRequest, plan_completion
from client.gateway.completion_response import CompletionAnswer
from client.gateway.errors import bad_request
from client.gateway.fields import SharedFields
from client.gateway.service import Service, ServiceOf, check_key, check_open, record_of
from client.gateway.streams import EventStream, events, merged, started, unless_gone

router = APIRouter(dependencies=[Depends(check_key), Depends(check_open)], tags=["generation"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, service: ServiceOf) -> Response:
    """Answer a chat, streamed or not."""
    service.check_model(body.model)
    if len(body.messages) > service.settings.max_messages:
        raise bad_request("messages", f"may be at most {service.settings.max_messages}, got {len(body.messages)}")
    plan = await plan_chat(body, service.ensemble)
    answer = ChatAnswer(body, plan, f"chatcmpl-{secrets.token_hex(12)}", body.model)
    pieces = service.ensemble.generate(plan.call, record_of(request).request_id)
    return await _respond(request, service, body, answer, pieces, body.messages)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Continue one or several prompts, streamed or not."""
    service.check_model(body.model)
    calls = plan_completion(body, service.settings.max_prompts)
    answer = CompletionAnswer(body, calls, service.ensemble, f"cmpl-{secrets.token_hex(12)}", body.model)
    request_id = record_of(request).request_id
    pieces = merged([service.ensemble.generate(call, request_id) for call in calls])
    return await _respond(request, service, body, answer, pieces, body.prompt)


async def _respond(
    request: Request,
    service: Service,
    body: SharedFields,
    answer: ChatAnswer | CompletionAnswer,
    pieces: AsyncGenerator[Any, None],
    prompt: Any,
) -> Response:
    """The response to a request that was accepted. Whatever happens to it, `pieces` is closed in the end."""
    record = record_of(request)
    record.details |= {"model": body.model, "stream": bool(body.stream), "n": body.num_choices}
    if service.settings.log_prompts:
        record.details["prompt"] = prompt
    service.num_answering += 1

    async def close() -> None:
        await pieces.aclose()
        service.num_answering -= 1
        usage = answer.usage
        record.details |= {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reasons": answer.finish_reasons,
        }

    try:
        if body.stream:
            chunks = await unless_gone(request, started(answer.chunks(pieces)))
            record.on_first_token()
            return EventStream(events(chunks), close)
        whole = await unless_gone(request, answer.whole(pieces))
    except BaseException:
        await close()
        raise
    await close()
    return Response(orjson.dumps(whole), media_type="application/json")
