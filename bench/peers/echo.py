"""The raw echo: reads so many bytes, answers so many, on a TCP connection and an asyncio loop and nothing else.

python -m bench.peers.echo HOST PORT REQUEST_BYTES ANSWER_BYTES    # dials, as an agent does
"""

from __future__ import annotations

import asyncio
import sys


class Echo(asyncio.Protocol):
    def __init__(self, request_bytes: int, answer: bytes) -> None:
        self._request_bytes, self._answer = request_bytes, answer
        self._received = 0
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        while self._received >= self._request_bytes:
            self._received -= self._request_bytes
            self._transport.write(self._answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()


class Caller(asyncio.Protocol):
    """The other end: sends a request, and tells when the whole answer is there."""

    def __init__(self, answer_bytes: int) -> None:
        self._answer_bytes = answer_bytes
        self._received = 0
        self._answered: asyncio.Future[None] | None = None
        self.connected = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.connected.set()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._received >= self._answer_bytes and self._answered is not None:
            self._received -= self._answer_bytes
            self._answered.set_result(None)

    async def call(self, request: bytes) -> None:
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._answered

    def close(self) -> None:
        self._transport.close()


async def main(host: str, port: int, request_bytes: int, answer_bytes: int) -> None:
    loop = asyncio.get_running_loop()
    _, echo = await loop.create_connection(lambda: Echo(request_bytes, bytes(answer_bytes)), host, port)
    await echo.lost.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
