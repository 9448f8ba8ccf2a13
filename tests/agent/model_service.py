"""A server of another protocol in memory: who may log in, who is in, and what the host refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from agent.drivers.base import Admit, Allowed, DriverError, LiveSession, Notify
from shared.access import Credential
from shared.resource import Protocol
from shared.services import Server


class ModelHostOf:
    """What stays when the agent is killed: the server, its logins and its sessions."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.spec: Server | None = None
        self.logins: dict[str, Credential] = {}
        self.live: dict[str, LiveSession] = {}
        self.gone: list[LiveSession] = []  # ended, and not told yet
        self.starts = 0
        self.now = 1_800_000_000
        self._sessions = 0

    def connect(self, username: str, **changes: object) -> str:
        assert username in self.logins, "the host lets nobody in who has no login"
        self._sessions += 1
        values: dict[str, object] = {
            "id": f"{self.protocol}-{self._sessions}",
            "username": username,
            "remote": "198.51.100.7:4000",
            "address": f"10.70.0.{self._sessions + 1}",
            "since": self.now + self._sessions,
            "rx": 0,
            "tx": 0,
        }
        session = LiveSession(**values | changes)  # type: ignore[arg-type]
        self.live[session.id] = session
        return session.id

    def move(self, session_id: str, rx: int, tx: int = 0) -> None:
        there = self.live[session_id]
        self.live[session_id] = replace(there, rx=there.rx + rx, tx=there.tx + tx)

    def end(self, session_id: str, reason: str = "the client left") -> None:
        session = self.live.pop(session_id, None)
        if session is not None:
            self.gone.append(replace(session, ended=self.now + 100, reason=reason))

    def reboot(self) -> None:
        self.live.clear()
        self.gone.clear()
        self.spec = None


class ModelService:
    def __init__(self, protocol: Protocol, host: ModelHostOf, admit: Admit, notify: Notify) -> None:
        self.protocol, self.host, self.admit, self.notify = protocol, host, admit, notify
        self.calls: list[tuple[str, object]] = []
        self.failing: dict[str, Exception] = {}  # method -> what it raises
        self.poison: dict[str, str] = {}  # user names that the host refuses, with its words
        self.gates: dict[str, asyncio.Event] = {}  # method -> what it waits for
        self.closed = False
        self._inside = 0

    def made(self, method: str) -> list[object]:
        return [argument for name, argument in self.calls if name == method]

    def connect(self, username: str, **changes: object) -> str:
        session_id = self.host.connect(username, **changes)
        self.notify()
        return session_id

    async def ensure(self, spec: Server) -> None:
        await self._enter("ensure", spec)
        if self.host.spec != spec:
            self.host.spec = spec
            self.host.starts += 1

    async def stop(self) -> None:
        await self._enter("stop", None)
        for session_id in list(self.host.live):
            self.host.end(session_id, "the server stopped")
        self.host.spec = None
        self.host.logins.clear()

    async def credentials(self) -> Mapping[str, Credential]:
        await self._enter("credentials", None)
        return {
            username: Credential(
                protocol=login.protocol,
                username=username,
                account=0,
                secret=login.secret,
                public_keys=tuple(sorted(login.public_keys)),
                fingerprint=login.fingerprint,
            )
            for username, login in self.host.logins.items()
        }

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        await self._enter("put", [credential.username for credential in credentials])
        refused = {name: words for name, words in self.poison.items() if any(c.username == name for c in credentials)}
        for credential in credentials:
            if credential.username not in refused:
                self.host.logins[credential.username] = credential
        return refused

    async def remove(self, usernames: Sequence[str]) -> dict[str, str]:
        await self._enter("remove", list(usernames))
        refused = {name: words for name, words in self.poison.items() if name in usernames}
        for username in usernames:
            if username not in refused:
                self.host.logins.pop(username, None)
                for session in list(self.host.live.values()):
                    if session.username == username:
                        self.host.end(session.id, "its login was taken away")
        return refused

    async def sessions(self) -> list[LiveSession]:
        await self._enter("sessions", None)
        gone, self.host.gone = self.host.gone, []
        return [*self.host.live.values(), *gone]

    async def kick(self, session_id: str) -> None:
        await self._enter("kick", session_id)
        self.host.end(session_id, "kicked")
        self.notify()

    async def close(self) -> None:
        self.closed = True

    async def _enter(self, method: str, argument: object) -> None:
        assert self._inside == 0, "two calls overlap"
        self._inside += 1
        try:
            self.calls.append((method, argument))
            if (gate := self.gates.get(method)) is not None:
                await gate.wait()
            else:
                await asyncio.sleep(0)
            if method in self.failing:
                raise self.failing[method]
        finally:
            self._inside -= 1


class ModelHosts:
    """The servers of one host; `open` makes drivers for it, as often as an agent starts there."""

    def __init__(self) -> None:
        self.hosts = {protocol: ModelHostOf(protocol) for protocol in Protocol if protocol != Protocol.WIREGUARD}
        self.drivers: dict[Protocol, ModelService] = {}
        self.failing: dict[Protocol, dict[str, Exception]] = {}  # from the start

    def open(self, protocol: Protocol, admit: Admit, notify: Notify) -> ModelService:
        driver = ModelService(protocol, self.hosts[protocol], admit, notify)
        driver.failing |= self.failing.get(protocol, {})
        self.drivers[protocol] = driver
        return driver


class ModelLimits:
    def __init__(self) -> None:
        self.applied: dict[int, Allowed] = {}
        self.failing: DriverError | None = None
        self.closed = False

    async def apply(self, accounts: Sequence[Allowed]) -> None:
        if self.failing is not None:
            raise self.failing
        self.applied = {allowed.account: allowed for allowed in accounts}

    async def close(self) -> None:
        self.closed = True
