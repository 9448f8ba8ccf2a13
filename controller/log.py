"""Structured logs: one JSON object per line on stderr, where the journal keeps them."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import BinaryIO, cast

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from shared.logstream import LogStream, take_standard_logging

request_id_var: ContextVar[str] = ContextVar("request_id")
"""Of the request that is being answered; every event that is logged meanwhile tells it."""


def configure(level: str) -> None:
    """Set the process's logging up; `level` is debug, info, warning or error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    stream = LogStream(sys.stderr.buffer)
    structlog.configure(
        processors=[
            add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=orjson.dumps, default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(cast(BinaryIO, stream)),
        cache_logger_on_first_use=True,
    )
    take_standard_logging(stream, number)


def add_request_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if (request_id := request_id_var.get(None)) is not None:
        event.setdefault("request_id", request_id)
    return event
