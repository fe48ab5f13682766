"""`python -m client.gateway`: runs the gateway until SIGTERM or Ctrl-C, which drain it; a second one does not wait."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn

from client.gateway.app import make_app
from client.gateway.keys import ApiKeys
from client.gateway.logs import log, start_logging
from client.gateway.service import Service
from client.gateway.settings import GatewaySettings

_POLL_S = 0.05
_CUT_OFF_S = 2


class DrainingServer(uvicorn.Server):
    """Answers its probes with "not ready" while what runs goes on, and ends with status 0 when that is over."""

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace_s = grace_s
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one cuts off."""
        if self._service.is_draining:
            self.force_exit = self.should_exit = True
            return
        self._service.is_draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining", extra={"fields": {"running": self._service.num_answering, "grace_s": self._grace_s}})
        end_s = asyncio.get_running_loop().time() + self._grace_s
        while self._service.num_answering and asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(_POLL_S)
        if self._service.num_answering:
            log.warning("the grace period is over", extra={"fields": {"running": self._service.num_answering}})
        self.should_exit = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gateway; the exit status is 0 after a drain."""
    settings = GatewaySettings.load(argv)
    start_logging(settings.log_level)
    try:
        keys = ApiKeys.load(settings.api_keys_file, os.environ)
    except (OSError, ValueError) as error:
        log.error(str(error))
        return 2
    app, service = make_app(settings, keys)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
        timeout_graceful_shutdown=_CUT_OFF_S,
    )
    server = DrainingServer(config, service, settings.grace_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        server.run()
    except OSError as error:
        log.error("port %d cannot be used: %s", settings.port, error)
        return 1
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
