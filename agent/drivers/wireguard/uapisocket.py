"""One connection to the UAPI socket of an interface, kept open for all its operations."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from agent.drivers.base import DeviceMissing, DriverError
from agent.drivers.wireguard import uapi

T = TypeVar("T")

_TIMEOUT = 60.0  # seconds without progress
_RECEIVE_BYTES = 256 * 1024
_SMALL = 4096  # bytes of a set operation of a few peers
_MOMENT = 1  # milliseconds
_END = b"\n\n"


class UapiSocket:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        self._socket: socket.socket | None = None

    async def answers(self) -> bool:
        """Whether a program listens; the file alone says nothing, it may be left over from one that was killed."""
        try:
            (await self._connect()).close()
        except DeviceMissing:
            return False
        return True

    async def set(self, what: str, operation: Iterable[bytes]) -> None:
        """Send one set operation; `what` opens the error's text. A part of one that fails may be done."""
        async with self._lock:
            await self._checked(what, operation)

    async def get(self, what: str, parse: Callable[[str], T]) -> T:
        """Ask for everything and return what `parse` makes of it, in a thread; the text has the private key in it."""
        async with self._lock:
            answer = await self._checked(what, uapi.GET)
        try:
            return await asyncio.to_thread(parse, answer)
        except ValueError as error:
            raise DriverError(f"{what}: {self._path} answered something else than the UAPI protocol") from error

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _checked(self, what: str, operation: Iterable[bytes]) -> str:
        try:
            answer = await self._repeatable(operation)
            words = uapi.parse_error(answer)
        except DeviceMissing as error:
            raise DeviceMissing(f"{what}: {error}") from error
        except (OSError, ValueError) as error:
            self.close()
            reason = f"nothing within {_TIMEOUT:g} seconds" if isinstance(error, TimeoutError) else str(error)
            raise DriverError(f"{what}: {self._path}: {reason}") from error
        except BaseException:  # cancelled in between: the rest of the answer must not be read as the next one
            self.close()
            raise
        if words is not None:
            self.close()  # what the program left unread of a refused operation would be taken for the next one
            raise DriverError(f"{what}: {words}")
        return answer

    async def _repeatable(self, operation: Iterable[bytes]) -> str:
        """Exchange on the open connection, or on a new one: the program may have been restarted in between."""
        if self._socket is not None:
            try:
                return await self._exchange(self._socket, operation)
            except ConnectionError:
                self.close()
        self._socket = await self._connect()
        try:
            return await self._exchange(self._socket, operation)
        except ConnectionError as error:
            raise DeviceMissing(f"the program at {self._path} closed the connection") from error

    async def _exchange(self, opened: socket.socket, operation: Iterable[bytes]) -> str:
        loop = asyncio.get_running_loop()
        answer = bytearray()  # one that grows: the parts of a large dump would leave holes in the heap
        async with asyncio.timeout(_TIMEOUT) as limit:
            sent = 0
            with contextlib.suppress(ConnectionError):  # one that is refused is answered before it is read to its end
                for piece in operation:
                    await loop.sock_sendall(opened, piece)
                    sent += len(piece)
                    limit.reschedule(loop.time() + _TIMEOUT)
            small = sent <= _SMALL and operation is not uapi.GET
            if small:
                _wait_a_moment(opened)
            while not answer.endswith(_END):
                part = await loop.sock_recv(opened, _SMALL if small else _RECEIVE_BYTES)
                if not part:
                    raise ConnectionResetError
                answer += part
        return answer.decode()

    async def _connect(self) -> socket.socket:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(opened, str(self._path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            opened.close()
            raise DeviceMissing(f"no program answers at {self._path}") from error
        except OSError as error:
            opened.close()
            raise DriverError(f"{self._path}: {error.strerror}") from error
        except BaseException:
            opened.close()
            raise
        return opened


def _wait_a_moment(opened: socket.socket) -> None:
    """Wait here for the answer to a small change: it comes sooner than the event loop could go away and come back.

    One that takes longer is awaited as any other.
    """
    poll = select.poll()
    poll.register(opened, select.POLLIN)
    poll.poll(_MOMENT)
