"""One OpenVPN process that we are attached to: its clients, who asks to come in, and who has to go."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field

import structlog

from agent.drivers.base import DriverError, LiveSession, Notify
from agent.drivers.openvpn import process
from agent.drivers.openvpn.config import Settings, quote
from agent.drivers.openvpn.logins import Logins
from agent.drivers.openvpn.management import Management
from agent.drivers.openvpn.messages import ClientEvent, Notice, Row, login_name, offloaded, remote, table
from agent.drivers.openvpn.process import Launcher, Process

log = structlog.get_logger(__name__)

SERVER_ENDED = "the server ended"
_START = 20.0  # seconds; the host may be busy
_EXIT = 1.0
# A client that was refused is kept for five seconds, so that what it still sends is not taken for a new handshake.
_LINGER = 10.0
_UNHEARD_KEYS = frozenset(range(64))  # key negotiations of a client that was let in by an agent before this one


@dataclass(slots=True)
class Client:
    cid: int
    username: str
    keys: list[int] = field(default_factory=list)  # numbers of the key negotiations that were let in
    adopted: bool = False  # `keys` is not all of them
    established: bool = False
    remote: str = ""
    address: str = ""
    address6: str = ""
    since: int = 0
    rx: int = 0
    tx: int = 0
    heard: float = field(default_factory=time.monotonic)  # when `rx` last grew


class Server:
    def __init__(
        self,
        running: Process,
        settings: Settings,
        name: str,
        management: Management,
        *,
        launcher: Launcher,
        boot_id: str,
        logins: Logins,
        ended: Callable[[LiveSession], None],
        notify: Notify,
    ) -> None:
        self.process = running
        self.settings = settings
        self.name = name
        self.offloaded = False  # the kernel passes the data
        self._launcher = launcher
        self._boot_id = boot_id
        self._logins = logins
        self._ended = ended
        self._notify = notify
        self._clients: dict[int, Client] = {}
        self._leaving: dict[int, float] = {}  # cid -> when it has to be gone at the latest
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = asyncio.Event()
        self._words = ""
        self._attach(management)

    @property
    def alive(self) -> bool:
        return process.alive(self.process)

    @property
    def attached(self) -> bool:
        return self._management.open

    @property
    def usernames(self) -> set[str]:
        """Whose clients are in."""
        return {client.username for client in self._clients.values()}

    async def go(self) -> None:
        """Open the port; raise DriverError with OpenVPN's own words where it cannot."""
        self._management.tell("state on", "hold release")
        serving = asyncio.create_task(self._serving.wait())
        drained = asyncio.create_task(self._management.drained())
        try:
            await asyncio.wait((serving, drained), timeout=_START, return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            drained.cancel()
        if not self._serving.is_set():
            raise DriverError(self._words or f"openvpn did not begin to serve within {_START:g} s")
        if self.settings.dco:
            await self._look()
            if not self.offloaded:
                log.warning("openvpn.not_offloaded", transport=self.settings.transport, missing="module ovpn-dco-v2")

    async def adopt(self) -> bool:
        """Learn the clients of a process that another agent started; return whether it serves at all."""
        states = await self._management.ask("state", listing=True)
        if not any(line.split(",")[1:2] == ["CONNECTED"] for line in states):
            return False
        self._serving.set()
        self._management.tell("state on")
        for line in table(await self._look()):
            if not line.address:
                # It asked to come in while nobody was attached. It would wait for a minute: have it ask again.
                self._management.tell(f"client-kill {line.cid}")
        return True

    async def attach(self, management: Management) -> None:
        """Go on with a new connection to the process; it lived on while the old one was lost."""
        self._attach(management)
        await self.adopt()

    async def sessions(self) -> list[LiveSession]:
        """Where the kernel passes the data, what passed since the last look is lost with a session that ends by itself:
        OpenVPN forgets a client before it asks the kernel for its last bytes. One that says goodbye is kept for five
        seconds, in which a look has them all."""
        await self._look()
        if self.settings.dco:
            too_long_ago = time.monotonic() - self.settings.patience
            await self.disconnect([client for client in self._clients.values() if client.heard < too_long_ago], "")
        return [self._session(client) for client in self._clients.values() if client.established]

    def clients(self, *, usernames: Iterable[str] = (), session: str = "") -> list[Client]:
        """Those that are in by one of these names, or have this session."""
        wanted = set(usernames)
        return [
            client
            for client in self._clients.values()
            if client.username in wanted or (session and self._session_id(client.cid) == session)
        ]

    async def disconnect(self, clients: Iterable[Client], reason: str) -> None:
        """End their sessions: when this returns no packet of theirs passes any more.

        The first command tells the client, and gives it five seconds that a hostile one would use. Refusing its keys
        afterwards makes them worthless at once.
        """
        leaving = list(clients)
        if not leaving:
            return
        for client in leaving:
            self._expel(client.cid, _UNHEARD_KEYS.union(client.keys) if client.adopted else client.keys)
        await self._management.ask("pid")  # it has obeyed before it answers
        await self._look()
        for client in leaving:
            self._finish(client, reason)

    async def end(self) -> None:
        """End the process; what it says of its clients on the way out is heard."""
        await self._launcher.end(self.process, self._management.tell)
        await self._management.drained()
        self._finish_all()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._management.close()

    def _attach(self, management: Management) -> None:
        self._management = management
        management.listen(self._heard, self._disconnected)

    def _heard(self, message: ClientEvent | Notice) -> None:
        if isinstance(message, Notice):
            if message.source == "STATE" and message.text.split(",")[1:2] == ["CONNECTED"]:
                self._serving.set()
            elif message.source == "FATAL":
                self._words = message.text
            elif message.source == "HOLD" and self._serving.is_set():
                self._management.tell("hold release")  # it starts over by itself, and would hold still for ever
        elif message.kind in ("CONNECT", "REAUTH"):
            self._asked(message)
        elif message.kind == "ESTABLISHED":
            self._established(message)
        elif message.kind == "DISCONNECT":
            self._left(message)

    def _asked(self, event: ClientEvent) -> None:
        username = login_name(event.variables.get("username", ""), event.variables.get("common_name", ""))
        again = event.kind == "REAUTH"
        reason = self._logins.decide(username, event.variables, again=again)
        if reason is not None:
            self._answer(event, username, reason)
        else:
            self._spawn(self._examine(event, username, again=again))

    async def _examine(self, event: ClientEvent, username: str, *, again: bool) -> None:
        reason = await self._logins.examine(username, event.variables, again=again)
        if self.attached:  # else it asks again, those who were not answered are sent away when we are back
            self._answer(event, username, reason)

    def _answer(self, event: ClientEvent, username: str, reason: str) -> None:
        cid, kid = event.cid, event.kid or 0
        if event.cid in self._leaving:
            reason = reason or "this session was ended"
        if not reason:
            client = self._clients.setdefault(cid, Client(cid, username))
            client.keys.append(kid)
            self._management.tell(f"client-auth-nt {cid} {kid}")
            return
        words = quote("".join(character if character.isprintable() else " " for character in reason))
        self._management.tell(f"client-deny {cid} {kid} {words} {words}")
        if (known := self._clients.get(cid)) is not None:
            # A refused renewal would leave the old key in use for up to an hour.
            self._spawn(self._refuse(known, reason))

    async def _refuse(self, client: Client, reason: str) -> None:
        with contextlib.suppress(DriverError):  # the connection is lost, which is told elsewhere
            await self.disconnect([client], reason)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _expel(self, cid: int, keys: Iterable[int]) -> None:
        self._leaving[cid] = time.monotonic() + _LINGER
        self._management.tell(f"client-kill {cid}", *(f"client-deny {cid} {kid} ended" for kid in keys))

    def _established(self, event: ClientEvent) -> None:
        client = self._clients.get(event.cid)
        if client is None:
            return
        told = event.variables
        client.established = True
        client.remote = remote(told.get("trusted_ip") or told.get("trusted_ip6", ""), told.get("trusted_port", ""))
        client.address = told.get("ifconfig_pool_remote_ip", "")
        client.address6 = told.get("ifconfig_pool_remote_ip6", "")
        client.since = _count(told.get("time_unix", "")) or int(time.time())
        self._notify()

    def _left(self, event: ClientEvent) -> None:
        self._leaving.pop(event.cid, None)
        client = self._clients.get(event.cid)
        if client is None:
            return
        client.rx = max(client.rx, _count(event.variables.get("bytes_received", "")))
        client.tx = max(client.tx, _count(event.variables.get("bytes_sent", "")))
        self._finish(client, "")

    def _finish(self, client: Client, reason: str) -> None:
        if self._clients.pop(client.cid, None) is None or not client.established:
            return
        self._ended(self._session(client, ended=int(time.time()), reason=reason))
        self._notify()

    async def _look(self) -> list[str]:
        return await self._management.ask("status 3", listing=True, take=self._take_table)

    def _take_table(self, lines: list[str]) -> None:
        """Take the counters, and learn who came and went while nobody was attached."""
        self.offloaded = offloaded(lines)
        rows = {row.cid: row for row in table(lines)}
        for cid, row in rows.items():
            client = self._clients.get(cid)
            if client is None and row.address and cid not in self._leaving:
                client = self._clients[cid] = Client(cid, row.username, adopted=True)
            if client is not None and row.address:
                _update(client, row)
        for client in [client for client in self._clients.values() if client.established and client.cid not in rows]:
            self._finish(client, "")
        self._leaving = {cid: until for cid, until in self._leaving.items() if cid in rows}
        for cid in [cid for cid, until in self._leaving.items() if time.monotonic() > until]:
            log.warning("openvpn.session_stays", transport=self.settings.transport, cid=cid)
            self._expel(cid, _UNHEARD_KEYS)

    def _disconnected(self) -> None:
        self._spawn(self._after_end())

    async def _after_end(self) -> None:
        """The connection ends a moment before the process does, where it does."""
        if await process.gone(self.process, _EXIT):
            self._finish_all()
        self._notify()

    def _finish_all(self) -> None:
        for client in list(self._clients.values()):
            self._finish(client, SERVER_ENDED)

    def _session(self, client: Client, ended: int = 0, reason: str = "") -> LiveSession:
        return LiveSession(
            id=self._session_id(client.cid),
            username=client.username,
            remote=client.remote,
            address=client.address,
            address6=client.address6,
            since=client.since,
            rx=client.rx,
            tx=client.tx,
            ended=ended,
            reason=reason,
        )

    def _session_id(self, cid: int) -> str:
        """OpenVPN numbers its clients from 0 on, in each process."""
        text = f"{self._boot_id} {self.process.pid} {self.process.started} {cid}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _update(client: Client, row: Row) -> None:
    client.established = True
    client.remote = client.remote or row.remote  # what it was told of has the port in any case
    client.address, client.address6 = row.address, row.address6
    if row.rx > client.rx:
        client.heard = time.monotonic()
    client.since, client.rx, client.tx = row.since, row.rx, row.tx


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else 0
