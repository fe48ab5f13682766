"""What operators and clients ask about the service: models, versions, health, metrics."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Depends, Response

from client.gateway import VERSION
from client.gateway.metrics import CONTENT_TYPE
from client.gateway.service import Service, ServiceOf, check_key
from client.gateway.text_routes import max_model_len

router = APIRouter(tags=["service"])
_LICENSE_URL = "https://www.apache.org/licenses/LICENSE-2.0"


def _model_card(service: Service, name: str, length: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "nemo-triton",
        "root": service.model_name,
        "parent": None,
        "max_model_len": length,
    }


@router.get("/v1/models", dependencies=[Depends(check_key)])
async def models(service: ServiceOf) -> dict[str, Any]:
    """All names the model is served under."""
    length = await max_model_len(service)
    return {"object": "list", "data": [_model_card(service, name, length) for name in service.settings.model_names]}


@router.get("/v1/models/{model:path}", dependencies=[Depends(check_key)])
async def model_of(model: str, service: ServiceOf) -> dict[str, Any]:
    """One of them."""
    service.check_model(model)
    return _model_card(service, model, await max_model_len(service))


@router.get("/v1/health/live")
async def live() -> dict[str, str]:
    """200 once the process runs, also while the model is loading."""
    return {"object": "health.response", "message": "Service is live.", "status": "live"}


@router.get("/v1/health/ready")
async def ready(service: ServiceOf) -> Response:
    """200 when requests are answered; 503 while loading, draining or restarting."""
    if await service.is_ready():
        status, body = 200, {"object": "health.response", "message": "Service is ready.", "status": "ready"}
    else:
        why = "draining" if service.is_draining else "the model is not loaded"
        status, body = (
            503,
            {"object": "health.response", "message": f"Service is not ready: {why}.", "status": "not ready"},
        )
    return Response(orjson.dumps(body), status, media_type="application/json")


@router.get("/v1/metrics")
async def metrics(service: ServiceOf) -> Response:
    """The engine's metrics and the gateway's, in Prometheus' text format."""
    return Response(await service.metrics.page(), media_type=CONTENT_TYPE)


@router.get("/v1/version")
async def version() -> dict[str, str]:
    """Version of this package, and of the API's contract."""
    return {"release": VERSION, "api": "v1"}


@router.get("/v1/metadata")
async def metadata(service: ServiceOf) -> dict[str, Any]:
    """As NIM has it, and in `engineInfo` what the engine says it runs on."""
    return {
        "version": VERSION,
        "modelInfo": [{"shortName": name, "modelUrl": ""} for name in service.settings.model_names],
        "assetInfo": [],
        "licenseInfo": {"name": "Apache-2.0", "path": "LICENSE", "url": _LICENSE_URL},
        "engineInfo": await service.metrics.engine_info(),
    }
