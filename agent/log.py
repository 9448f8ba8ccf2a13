"""One place that configures logging: JSON lines on stderr, for the journal."""

from __future__ import annotations

import logging
import sys
from typing import TextIO, cast

import structlog

from shared.logstream import LogStream


def configure(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, LogStream(sys.stderr.buffer))),
        cache_logger_on_first_use=False,
    )
