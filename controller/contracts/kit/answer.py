"""An answer whose whole body is at hand, as bytes on the wire (RFC 9112)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

_ALWAYS = "Server: skynetvpn\r\nX-Content-Type-Options: nosniff\r\n"


class Answer(web.StreamResponse):
    """aiohttp's own Response weighs streams, compression, payloads and cookies for each answer: more work than what
    most requests ask for. The header fields are a plain dictionary here; `headers` of the base class stay unused."""

    _writer: AbstractStreamWriter
    _head: str

    def __init__(self, body: bytes, status: int, fields: Mapping[str, str]) -> None:
        super().__init__(status=status)
        self._content = body
        self.fields = {**fields}

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        version, fields = request.version, self.fields
        if self.status != 204:
            fields["Content-Length"] = str(len(self._content))
        if request.method == "HEAD":
            self._content = b""
        fields["Date"] = _date(int(time.time()))
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        if not self._keep_alive:
            fields["Connection"] = "close"
        elif version < (1, 1):
            fields["Connection"] = "keep-alive"
        head = f"HTTP/{version[0]}.{version[1]} {self.status} {self.reason}\r\n{_ALWAYS}"
        for name, value in fields.items():
            if not value.isprintable():
                raise ValueError(f"a control character in the header {name}")
            head += f"{name}: {value}\r\n"
        self._head = head
        self._writer = request.writer
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        await self._writer.write(f"{self._head}\r\n".encode() + self._content)


@lru_cache(1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
