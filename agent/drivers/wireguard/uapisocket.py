"""One connection to the UAPI socket of an interface, kept open; each exchange runs in a thread."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from agent.drivers.base import DeviceMissing, DriverError
from agent.drivers.wireguard import uapi
from shared.protocol import PeerStats

T = TypeVar("T")

_TIMEOUT = 30.0
_RECEIVE_BYTES = 256 * 1024
_END = b"\n\n"


class _Gone(Exception):
    """The program closed the connection before it had answered."""


class UapiSocket:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    async def answers(self) -> bool:
        """Whether a program listens; the file alone says nothing, it may be left over from one that was killed."""

        def connect() -> bool:
            try:
                self._connect().close()
            except DeviceMissing:
                return False
            return True

        return await asyncio.to_thread(connect)

    async def set(self, what: str, operations: Iterable[bytes]) -> None:
        """Send set operations one after the other; the first error ends it.

        `what` opens the error's text. The operations are encoded in the thread as well, one at a time.
        """

        def send() -> None:
            for operation in operations:
                self._checked(what, operation)

        await self._in_thread(send)

    async def get(self, what: str) -> str:
        """The whole answer to `get`, with the private key in it."""
        return await self._in_thread(lambda: self._checked(what, uapi.GET))

    async def stats(self, what: str) -> list[PeerStats]:
        return await self._in_thread(lambda: uapi.parse_stats(self._checked(what, uapi.GET)))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _in_thread(self, exchange: Callable[[], T]) -> T:
        def locked() -> T:
            # A caller that was cancelled leaves its exchange running: the next one waits here for the connection.
            with self._lock:
                return exchange()

        return await asyncio.to_thread(locked)

    def _checked(self, what: str, operation: bytes) -> str:
        try:
            answer = self._repeatable(operation)
            words = uapi.parse_error(answer)
        except DeviceMissing as error:
            raise DeviceMissing(f"{what}: {error}") from error
        except (OSError, ValueError) as error:
            self.close()
            raise DriverError(f"{what}: {self._path}: {error}") from error
        if words is not None:
            self.close()  # what is left of a refused operation would be read as the next one
            raise DriverError(f"{what}: {words}")
        return answer

    def _repeatable(self, operation: bytes) -> str:
        """Exchange on the open connection, or on a new one: the program may have been restarted in between."""
        if self._socket is not None:
            try:
                return self._exchange(self._socket, operation)
            except (_Gone, ConnectionError, BrokenPipeError):
                self.close()
        self._socket = self._connect()
        try:
            return self._exchange(self._socket, operation)
        except (_Gone, ConnectionError) as error:
            raise DeviceMissing(f"the program at {self._path} closed the connection") from error

    def _exchange(self, opened: socket.socket, operation: bytes) -> str:
        opened.sendall(operation)
        parts = []
        while True:
            part = opened.recv(_RECEIVE_BYTES)
            if not part:
                raise _Gone
            parts.append(part)
            if part.endswith(_END) or (len(part) < len(_END) and b"".join(parts[-2:]).endswith(_END)):
                return b"".join(parts).decode()

    def _connect(self) -> socket.socket:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.settimeout(_TIMEOUT)
        try:
            opened.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            opened.close()
            raise DeviceMissing(f"no program answers at {self._path}") from error
        except OSError as error:
            opened.close()
            raise DriverError(f"{self._path}: {error.strerror}") from error
        return opened
