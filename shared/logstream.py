"""A stream for lines of a log, on a disk that may be full: what cannot be written is lost, and never an error."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any, BinaryIO


class LogStream:
    """Takes whole lines. The first that can be written again follows one that says how many were lost."""

    def __init__(self, stream: BinaryIO) -> None:
        # Not the buffer: it would keep what failed, and fail with it again, also when the process ends.
        self._stream: Any = getattr(stream, "raw", stream)
        self._lost = 0
        self._torn = False  # half of a line is there

    def write(self, lines: bytes | str) -> None:
        data = lines.encode(errors="backslashreplace") if isinstance(lines, str) else lines
        lost = data.count(b"\n")
        try:
            if self._lost:
                self._write(_lost(self._lost))
                self._lost = 0
            self._write(data)
        except (OSError, ValueError):  # ValueError: it is closed
            self._lost += lost

    def flush(self) -> None:
        """Nothing waits: `write` has done it."""

    def _write(self, data: bytes) -> None:
        rest = memoryview(b"\n" + data if self._torn else data)
        while rest:
            written = self._stream.write(rest)
            if not written:
                raise BlockingIOError
            self._torn = rest[written - 1] != ord("\n")
            rest = rest[written:]
        self._stream.flush()


def take_standard_logging(stream: LogStream, level: int) -> None:
    """Have libraries that use the standard logging speak in the same form, warnings and worse only."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonLine())
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler])


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "event": record.getMessage(),
            "logger": record.name,
            "level": record.levelname.lower(),
            "timestamp": _iso(record.created),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


def _lost(lines: int) -> bytes:
    event = {"event": "log.lost", "lines": lines, "level": "warning", "timestamp": _iso(time.time())}
    return json.dumps(event).encode() + b"\n"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
