"""One place that configures logging: JSON lines on stderr, for the journal."""

from __future__ import annotations

import logging
import sys
from typing import TextIO, cast

import structlog

from shared.logstream import LogStream, take_standard_logging


def configure(level: str) -> None:
    number = logging.getLevelNamesMapping()[level.upper()]
    stream = LogStream(sys.stderr.buffer)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, stream)),
        cache_logger_on_first_use=False,
    )
    take_standard_logging(stream, number)
