"""One line per request, in the form of every other log line but written many at a time."""

from __future__ import annotations

import asyncio
import time
from typing import BinaryIO

import orjson

from shared.logstream import LogStream

_DELAY = 0.05  # seconds that a line may wait for others
_FULL = 64 * 1024  # bytes that do not wait


class AccessLog:
    """The general logger costs more than most requests do; this one renders a dictionary and joins what is due."""

    def __init__(self, output: BinaryIO, *, enabled: bool = True) -> None:
        self._output = LogStream(output)
        self._enabled = enabled
        self._lines: list[bytes] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0
        self._date = ""

    def add(self, fields: dict[str, object]) -> None:
        if not self._enabled:
            return
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second, self._date = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        fields["level"] = "info"
        fields["timestamp"] = f"{self._date}.{int((now - second) * 1e6):06d}Z"
        line = orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
        self._lines.append(line)
        self._size += len(line)
        if self._size >= _FULL:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines, self._size = self._lines, [], 0
        if lines:
            self._output.write(b"".join(lines))
