"""One log format for all processes; lines go to standard error, which the server and the supervisor pass on."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
LOGGER_NAME = "nemo"


def start_logging(level: str) -> None:
    """Send this process's `nemo.*` lines from `level` on to standard error; called once a process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
