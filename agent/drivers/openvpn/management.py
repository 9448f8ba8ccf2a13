"""A connection to the management socket of one OpenVPN process: commands in order, notifications as they come."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import structlog

from agent.drivers.base import DriverError
from agent.drivers.openvpn.messages import END, AnswerLine, ClientEvent, MalformedMessage, Notice, Reader

log = structlog.get_logger(__name__)

_TIMEOUT = 10.0  # seconds for one answer
_READ_BYTES = 256 * 1024
_PEER = struct.Struct("3i")  # struct ucred, unix(7)

Heard = Callable[[ClientEvent | Notice], None]
Take = Callable[[list[str]], object]


class Management:
    """Only one agent can be attached at a time; OpenVPN lets a second one wait."""

    def __init__(self, opened: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid: int = _PEER.unpack(opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        self._reader = reader
        self._writer = writer
        self._pending: deque[_Question] = deque()
        self._heard: Heard = _nobody
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path) -> Self | None:
        """None where no process answers; a file alone may be left over from one that was killed."""
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.setblocking(False)
        try:
            with short(path) as name:
                await asyncio.get_running_loop().sock_connect(opened, name)
            reader, writer = await asyncio.open_unix_connection(sock=opened)
        except (FileNotFoundError, ConnectionRefusedError):
            opened.close()
            return None
        except OSError as error:
            opened.close()
            raise DriverError(f"{path}: {error.strerror}") from error
        except BaseException:
            opened.close()
            raise
        return cls(opened, reader, writer)

    @property
    def open(self) -> bool:
        return self._task is not None and not self._task.done()

    def listen(self, heard: Heard, ended: Callable[[], None]) -> None:
        """Read from now on, until `close` or the end of the connection, which `ended` is told of."""
        self._heard = heard
        self._task = asyncio.create_task(self._read())
        self._task.add_done_callback(lambda task: None if task.cancelled() else ended())

    def tell(self, *commands: str) -> None:
        """Send commands whose answers, one line each, nobody waits for."""
        self._send(commands, [_Question(listing=False, answer=None) for _ in commands])

    async def ask(self, command: str, *, listing: bool = False, take: Take = list) -> list[str]:
        """Send one command and return its answer: one line, or a list of them; raise DriverError for ERROR.

        `take` is called with it before anything that was said later is heard.
        """
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._send([command], [_Question(listing, answer, take)])
        try:
            async with asyncio.timeout(_TIMEOUT):
                return await answer
        except TimeoutError as error:
            raise DriverError(f"openvpn did not answer within {_TIMEOUT:g} s") from error

    async def close(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._writer.close()

    async def drained(self) -> None:
        """Wait for the process to end the connection; what it said before has been heard then."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _send(self, commands: Sequence[str], questions: list[_Question]) -> None:
        if not self.open or self._writer.is_closing():
            raise DriverError("openvpn has ended the connection")
        if any("\n" in command for command in commands):
            raise DriverError("a command is one line")
        self._pending.extend(questions)
        self._writer.write("".join(f"{command}\n" for command in commands).encode("utf-8", "replace"))

    async def _read(self) -> None:
        reader = Reader()
        try:
            while data := await self._reader.read(_READ_BYTES):
                for message in reader.feed(data):
                    if isinstance(message, AnswerLine):
                        self._answer(message.text)
                    else:
                        self._heard(message)
        except (MalformedMessage, DriverError, OSError) as error:
            # A new connection starts with a clean slate; the process and its clients are not touched.
            log.warning("openvpn.management_lost", error=str(error))
        finally:
            self._writer.close()
            for question in self._pending:
                question.fail("openvpn has ended the connection")
            self._pending.clear()

    def _answer(self, line: str) -> None:
        if not self._pending:
            return
        question = self._pending[0]
        if question.take(line):
            self._pending.popleft()


class _Question:
    def __init__(self, listing: bool, answer: asyncio.Future[list[str]] | None, take: Take = list) -> None:
        self._listing = listing
        self._answer = answer
        self._take = take
        self._lines: list[str] = []

    def take(self, line: str) -> bool:
        """Take a line of the answer; return whether it was the last one."""
        if line.startswith("ERROR:") and not self._lines:
            self.fail(f"openvpn: {line.removeprefix('ERROR:').strip()}")
            return True
        if self._listing and line != END:
            self._lines.append(line)
            return False
        if self._answer is not None and not self._answer.done():
            answer = self._lines if self._listing else [line]
            self._take(answer)
            self._answer.set_result(answer)
        return True

    def fail(self, words: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(DriverError(words))


def _nobody(message: ClientEvent | Notice) -> None:
    """Before `listen` nothing is read, so nothing comes here."""
    raise AssertionError(message)


@contextlib.contextmanager
def short(path: Path) -> Iterator[str]:
    """A name for a socket that fits into the 108 bytes of unix(7), however deep its directory is."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
