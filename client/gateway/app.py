"""The application: routes, errors in OpenAI's shape, and what stands around every request."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from client.gateway import VERSION, generation_routes, page_routes, service_routes, text_routes
from client.gateway.ensemble import Ensemble
from client.gateway.errors import ApiError
from client.gateway.keys import ApiKeys
from client.gateway.metrics import Metrics
from client.gateway.middleware import BoundedBody, Watched
from client.gateway.service import Service
from client.gateway.settings import GatewaySettings

# What pydantic puts into the place of an error besides names of fields: the branches of a union.
_NO_FIELD = re.compile(r".*[^a-z0-9_].*|str|int|float|bool|dict|list|[A-Z].*")
_PATHS = frozenset(
    (
        *("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/", "/openapi.json"),
        *("/v1/health/live", "/v1/health/ready", "/v1/metrics", "/v1/version", "/v1/metadata"),
    )
)


def make_app(settings: GatewaySettings, keys: ApiKeys) -> tuple[ASGIApp, Service]:
    """The whole ASGI application, and the service behind it."""
    metrics = Metrics(_PATHS, settings.triton_metrics)
    service = Service(settings, keys, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.ensemble = Ensemble(settings.triton)
        yield
        await service.ensemble.close()

    app = FastAPI(
        title="Mistral NeMo on Triton",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_bug)
    for module in (generation_routes, text_routes, page_routes, service_routes):
        app.include_router(module.router)
    return Watched(BoundedBody(app, settings.max_body_bytes), metrics), service


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    unknown = ApiError(
        error.status_code, f"{request.method} {request.url.path[:128]}: {error.detail}", code="unknown_url"
    )
    response = unknown.response()
    response.headers.update(error.headers or {})  # Allow, for a method that is not there
    return response


async def _on_invalid(_: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, by its parameter's name: status 400, as OpenAI has it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [each for each in first["loc"][1:] if isinstance(each, int) or not _NO_FIELD.fullmatch(str(each))]
    param = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in place).lstrip(".")
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        ).response()
    if not place or first["loc"][0] != "body":
        return ApiError(400, f"the body must be a JSON object sent as application/json: {first['msg']}").response()
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: there is no such parameter", param, "unknown_parameter").response()
    return ApiError(400, f"{param}: {first['msg']}", param).response()


async def _on_bug(_: Request, error: Exception) -> Response:
    return ApiError(500, f"internal error: {type(error).__name__}").response()
