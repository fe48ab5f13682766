"""What all routes share: settings, the ensemble, keys, metrics, and whether the service is draining."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from client.gateway.ensemble import Ensemble
from client.gateway.errors import ApiError
from client.gateway.keys import ApiKeys
from client.gateway.metrics import Metrics
from client.gateway.record import Record
from client.gateway.settings import GatewaySettings


class Service:
    """One gateway. `ensemble` is there once the event loop runs."""

    def __init__(self, settings: GatewaySettings, keys: ApiKeys, metrics: Metrics) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.ensemble: Ensemble
        self.created_s = int(time.time())
        self.is_draining = False
        self.num_answering = 0

    @property
    def model_name(self) -> str:
        """The name that stands in responses."""
        return self.settings.model_names[0]

    def check_model(self, model: str) -> None:
        """ApiError 404 for a model that is not served."""
        if model not in self.settings.model_names:
            served = " or ".join(self.settings.model_names)
            raise ApiError(
                404, f"the model {model[:128]!r} does not exist; served is {served}", "model", "model_not_found"
            )

    async def is_ready(self) -> bool:
        """Whether requests are answered now."""
        return not self.is_draining and await self.ensemble.is_ready()


def service_of(request: Request) -> Service:
    """The service a request came to."""
    service: Service = request.app.state.service
    return service


def record_of(request: Request) -> Record:
    """The request's record."""
    record: Record = request.scope["record"]
    return record


_bearer = HTTPBearer(auto_error=False, description="Needed when the gateway was given keys.")


def check_key(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None) -> None:
    """ApiError 401 without a valid key, where keys are needed."""
    keys = service_of(request).keys
    if keys.are_needed and not keys.allow(request.headers.get("authorization")):
        message = "an API key is needed: send `Authorization: Bearer <key>`"
        if request.headers.get("authorization"):
            message = "the API key is not valid"
        raise ApiError(401, message, code="invalid_api_key")


def check_open(request: Request) -> None:
    """ApiError 503 while draining: what runs goes on, nothing new begins."""
    if service_of(request).is_draining:
        raise ApiError(503, "the gateway is shutting down", code="draining")


ServiceOf = Annotated[Service, Depends(service_of)]
