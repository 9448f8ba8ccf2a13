"""An answer whose whole body is at hand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter


class Answer(web.StreamResponse):
    """aiohttp's own Response weighs streams, compression, payloads and cookies for each answer; that is more work than
    what most requests ask for."""

    _writer: AbstractStreamWriter

    def __init__(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status=status, headers=headers)
        self._content = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        headers, version = self.headers, request.version
        if self.status != 204:
            headers["Content-Length"] = str(len(self._content))
        if request.method == "HEAD":
            self._content = b""
        headers["Date"] = _date(int(time.time()))
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        if not self._keep_alive:
            headers["Connection"] = "close"
        elif version < (1, 1):
            headers["Connection"] = "keep-alive"
        self._writer = request.writer
        await self._writer.write_headers(f"HTTP/{version[0]}.{version[1]} {self.status} {self.reason}", headers)
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        await self._writer.write_eof(self._content)


@lru_cache(1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
