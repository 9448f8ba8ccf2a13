"""The API's connections: aiohttp's server without its routes, and a word for what is no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

Handle = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Malformed = Callable[[web.BaseRequest], web.StreamResponse]


class Listener(web.Server):
    """`malformed` answers what could not be read as a request; `closed` is called when the last connection has gone."""

    def __init__(self, handle: Handle, malformed: Malformed, closed: Callable[[], None], **options: Any) -> None:
        super().__init__(handle)
        self._malformed = malformed
        self._closed = closed
        self._options = options

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self._malformed, self._options)

    async def shutdown(self, timeout: float | None = None) -> None:
        await super().shutdown(timeout)
        self._closed()


class _Connection(web.RequestHandler):
    __slots__ = ("_malformed",)

    def __init__(self, server: Listener, malformed: Malformed, options: dict[str, Any]) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._malformed = malformed

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Quiet where a stranger is at fault: he must not fill the log with tracebacks."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        response = self._malformed(request)
        response.force_close()
        return response
