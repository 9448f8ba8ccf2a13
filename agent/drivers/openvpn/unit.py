"""Processes that systemd starts (skynetvpn-openvpn@.service): each connection to a socket of its becomes one.

The configuration goes in by that connection with everything that it needs, so that OpenVPN's own account reads no file
of the agent. What the process says before it serves comes back by it, and its end is the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from agent import files
from agent.drivers.base import DriverError, Unsupported
from agent.drivers.openvpn.config import quote
from agent.drivers.openvpn.management import Management, short
from agent.drivers.openvpn.process import ANSWER, FAREWELL, PATIENCE, PROGRAM, Process, clear, find, gone
from agent.errors import AgentError

START = "start"
UNITS = "skynetvpn-openvpn@*.service"
_ARGUMENTS = ["--config", "stdin"]
_MAX_WORDS = 2000


class Units:
    """`runtime` has systemd's socket in it, and those of the processes; `directory` the configurations."""

    def __init__(self, directory: Path, runtime: Path) -> None:
        self._directory = directory.absolute()
        self._runtime = runtime

    async def start(self, name: str) -> Management:
        answers = self.socket_path(name)
        try:
            text = await asyncio.to_thread(self._standalone, name)
            await clear(self, name)  # a start that was given up may have left one that holds still
        except OSError as error:
            raise DriverError(f"{answers}: {error.strerror}") from error
        except AgentError as error:
            raise DriverError(str(error)) from error
        with await self._connected() as connection:
            said = asyncio.create_task(_converse(connection, text.encode()))
            try:
                async with asyncio.timeout(ANSWER):
                    while not said.done():
                        if (management := await Management.connect(answers)) is not None:
                            return management
                        await asyncio.wait([said], timeout=0.01)
                raise _failed(said.result())
            except BaseException as error:
                with contextlib.suppress(DriverError, OSError):  # else the next start of this configuration does it
                    await clear(self, name)
                if isinstance(error, TimeoutError):
                    raise DriverError(f"openvpn opened no management socket at {answers}") from error
                raise
            finally:
                said.cancel()
                await asyncio.wait([said])

    def socket_path(self, name: str) -> Path:
        return self._runtime / f"{name}.sock"

    def find(self, pid: int, name: str) -> Process | None:
        return find(pid, _ARGUMENTS)

    async def end(self, process: Process, tell: Callable[[str], None]) -> None:
        """By its own socket: it has another account than the agent, which may not send it a signal."""
        for patience in (FAREWELL, PATIENCE):
            with contextlib.suppress(DriverError):  # it ends the connection a moment before it is gone
                tell("signal SIGTERM")
            if await gone(process, patience):
                return
        raise DriverError(f"openvpn (process {process.pid}) does not end: systemctl kill --signal=KILL '{UNITS}'")

    def _standalone(self, name: str) -> str:
        """The configuration with certificate and key in it, and with the place where the process answers."""
        text = files.read_private(self._directory / f"{name}.conf").decode()
        lines = [f"management {quote(str(self.socket_path(name)))} unix"]
        for line in text.splitlines():
            option, _, value = line.partition(" ")
            if option in ("cert", "key"):
                lines += [f"<{option}>", files.read_private(self._directory / value).decode(), f"</{option}>"]
            else:
                lines.append(line)
        return "\n".join([*lines, ""])

    async def _connected(self) -> socket.socket:
        start = self._runtime / START
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            with short(start) as path:
                await asyncio.get_running_loop().sock_connect(connection, path)
        except OSError as error:
            connection.close()
            words = f"systemd does not start openvpn, {start}: {error.strerror}"
            raise DriverError(f"{words}; systemctl start skynetvpn-openvpn.socket") from error
        return connection


async def _converse(connection: socket.socket, text: bytes) -> str:
    """Hand the text over and return what comes back until the end."""
    loop = asyncio.get_running_loop()
    said = b""
    # A process that gives up early has not read all of the text: the kernel tells us so once we have read its words.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await loop.sock_sendall(connection, text)
        connection.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        while data := await loop.sock_recv(connection, 65536):
            said += data
    return said.decode(errors="replace").strip()


def _failed(words: str) -> DriverError:
    if not words and shutil.which(PROGRAM) is None:
        return Unsupported(f"{PROGRAM} is not installed on this host")
    return DriverError(f"openvpn failed: {words[:_MAX_WORDS] or f'journalctl --unit={UNITS!r} tells more'}")
