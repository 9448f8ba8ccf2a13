"""strongSwan's IKE daemon as an instance of our own, configured through its control socket.

The official Python binding of VICI blocks, and would need a thread; the protocol is small (vici.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from agent.drivers.base import DriverError
from agent.drivers.l2tp import vici
from agent.drivers.l2tp.files import connection, shared_key, strongswan_conf
from agent.drivers.l2tp.processes import Daemon, Process, end
from agent.drivers.l2tp.records import write

PROGRAM = "/usr/sbin/charon-systemd"
CRYPTOGRAPHY = "/usr/lib/ipsec/plugins/libstrongswan-openssl.so"
PORTS = (500, 4500)
_ANSWER_WITHIN = 10.0
_END_WITHIN = 5.0  # it says farewell to its clients
_LONGEST_SOCKET = 100  # unix(7): 108 with the end


class Charon:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "charon.vici"
        self._daemon = Daemon(directory / "charon.pid")
        self._loaded: str | None = None  # the hash of what we loaded into the one that runs

    def running(self) -> bool:
        return self._daemon.find(self._mark) is not None

    async def ensure(self, psk: str, ended: Callable[[], None]) -> None:
        """Start it or adopt the one that runs, and load connection and key where they may differ. Its SAs live on."""
        process = self._daemon.find(self._mark)
        if process is None:
            await self.stop()
            process = await self._start()
        self._daemon.watch(process, ended)
        wanted = sha256(f"{process} {psk}".encode()).hexdigest()
        if wanted == self._loaded:
            await self._call("version", {})
            return
        await self._call("load-shared", shared_key(psk))
        await self._call("load-conn", connection())
        self._loaded = wanted

    async def stop(self) -> None:
        """End it, and with it all SAs."""
        self._daemon.unwatch()
        self._loaded = None
        if (process := self._daemon.find()) is not None:
            await end([process], _END_WITHIN)

    def close(self) -> None:
        self._daemon.unwatch()

    @property
    def _mark(self) -> str:
        return sha256(strongswan_conf(self._socket).encode()).hexdigest()[:16]

    async def _start(self) -> Process:
        if len(str(self._socket)) > _LONGEST_SOCKET:
            raise DriverError(f"{self._socket} is too long for the path of a socket: choose a shorter directory")
        configuration = self._directory / "strongswan.conf"
        await asyncio.to_thread(write, configuration, strongswan_conf(self._socket))
        starter = ["start-stop-daemon", "--start", "--background", "--notify-await", "--notify-timeout", "50"]
        files = ["--make-pidfile", "--pidfile", str(self._directory / "charon.pid")]
        return await self._daemon.start(
            self._mark,
            "charon",
            ["env", f"STRONGSWAN_CONF={configuration}", *starter, *files, "--exec", PROGRAM],
        )

    async def _call(self, command: str, message: vici.Message) -> dict[str, object]:
        """One request on a connection of its own; raise DriverError where charon refuses it."""
        try:
            async with asyncio.timeout(_ANSWER_WITHIN):
                answer = await self._exchange(vici.request(command, message))
        except TimeoutError as error:
            raise DriverError(f"charon does not answer {command} within {_ANSWER_WITHIN:g} s") from error
        except (OSError, EOFError, vici.MalformedPacket) as error:
            raise DriverError(f"charon's control socket failed at {command}: {error}") from error
        if answer.get("success", "yes") != "yes":
            raise DriverError(f"charon refuses {command}: {answer.get('errmsg', 'no message')}")
        return answer

    async def _exchange(self, request: bytes) -> dict[str, object]:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(request)
            (length,) = vici.HEADER.unpack(await reader.readexactly(vici.HEADER.size))
            if length > vici.MAX_PACKET:
                raise vici.MalformedPacket(f"a packet of {length} bytes is too long")
            return vici.response(await reader.readexactly(length))
        finally:
            writer.close()
