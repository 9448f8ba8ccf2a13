"""A second sshd for tunnels: its own configuration, host keys, port and process; the admin's own is never touched."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import msgspec
import structlog

from agent.drivers.base import Admit, DriverError, LiveSession, Notify
from agent.drivers.ssh import config, processes
from agent.drivers.ssh.accounts import Accounts
from agent.drivers.ssh.counters import Counters
from agent.drivers.ssh.passwd import GROUP, Login
from agent.drivers.ssh.rules import Client
from agent.drivers.ssh.sessions import Sessions
from agent.drivers.ssh.sshd import Sshd
from agent.drivers.ssh.tuns import Tun, Tuns
from shared.access import Credential
from shared.resource import Protocol
from shared.services import Server, SshServer

_LOOK_SECONDS = 0.25
_PATIENCE = 10.0  # seconds until what was killed is gone
_STRANGER_SECONDS = 2.0 * config.LOGIN_GRACE  # a connection that is no session by then has failed to log in
log = structlog.get_logger()


class Ssh:
    """The ServiceDriver of SSH; `directory` is its own, and private."""

    protocol = Protocol.SSH

    def __init__(self, directory: Path, *, boot_id: str, admit: Admit, notify: Notify) -> None:
        self._sshd = Sshd(directory)
        self._admit = admit
        self._notify = notify
        self._accounts = Accounts()
        self._counters = Counters()
        self._tuns = Tuns()
        self._spec: SshServer | None = None
        self._sessions = Sessions(directory / "sessions.json", self._sshd.log, boot_id, notify)
        self._adopted = False
        self._watcher: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._saves_fail = False
        self._strangers: dict[Client, float] = {}  # who is connected and has no session, and since when

    async def host_keys(self) -> list[str]:
        """The public host keys as `type base64`; made at the first call."""
        return await self._sshd.host_keys()

    # --- the server ---

    async def ensure(self, spec: Server) -> None:
        if not isinstance(spec, SshServer):
            raise DriverError(f"{type(spec).__name__} is not for sshd")
        self._spec = spec
        await self._accounts.prepare()
        await self._counters.ensure(spec.port)
        await self._sshd.ensure(spec, group=GROUP, key_directory=self._accounts.key_directory)
        await self._adopt()
        await self._take(await asyncio.to_thread(processes.all_sessions))
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch(), name="ssh sessions")
        if await self._tuns.bring((await self._tuns_of(None)).values()):  # last: without them TCP forwarding serves
            self._notify()

    async def stop(self) -> None:
        await self._stop_watching()
        await self._sshd.end()
        await self._accounts.remove_all()
        await self._take(await asyncio.to_thread(processes.all_sessions))
        await self._sessions.end(self._sessions.names(), "the server was stopped")
        await self._tuns.bring(())
        self._spec = None
        self._sessions.count(await self._counters.read())
        await self._counters.remove()
        await asyncio.to_thread(self._sessions.file.unlink, missing_ok=True)

    async def close(self) -> None:
        if self._watcher is not None:
            await self._stop_watching()
            await self._save()
        self._sessions.close()
        self._counters.close()
        self._tuns.close()

    # --- logins ---

    async def credentials(self) -> Mapping[str, Credential]:
        """Those that the pool has no address for have no tunnel: so they stay due, and their fault is told."""
        found = await self._accounts.read()
        return found | {
            name: msgspec.structs.replace(found[name], tunnel=0) for name in _beyond(self._spec, found.values())
        }

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        refused = await self._accounts.put(credentials)
        tuns = await self._tuns_of({each.username for each in credentials} - refused.keys())
        return refused | _beyond(self._spec, credentials) | await self._tuns.put(tuns)

    async def remove(self, usernames: Sequence[str]) -> dict[str, str]:
        gone = await self._accounts.remove(usernames)
        await self._throw_out({name: login.uid for name, login in gone.items()})
        await self._tuns.remove([tun for login in gone.values() if (tun := self._tun(login)) is not None])
        return {}

    async def _tuns_of(self, names: Set[str] | None) -> dict[str, Tun]:
        """By user name, those that these logins (None = all) must have."""
        if self._spec is None or not self._spec.tun:
            return {}
        logins = (await self._accounts.logins()).items()
        found = {name: self._tun(login) for name, login in logins if names is None or name in names}
        return {name: tun for name, tun in found.items() if tun is not None}

    def _tun(self, login: Login) -> Tun | None:
        tunnel = self._spec.tunnel(login.tunnel) if self._spec is not None else None
        return Tun(tunnel, login.uid) if tunnel is not None else None

    # --- sessions ---

    async def sessions(self) -> list[LiveSession]:
        await self._adopt()  # whoever asks before the first `ensure` must not take the sessions for gone
        await self._look()
        if self._spec is not None and self._spec.tun and self._sessions.without_address():
            users = await self._tuns.users()
            doubtful = {id_: pid for id_, (uid, pid) in self._sessions.without_address().items() if uid in users}
            self._sessions.locate(await asyncio.to_thread(_addresses, self._spec, doubtful))
        ended = self._sessions.ended  # before the counters are read: these have no packet that comes later
        counts = await self._counters.read()
        self._sessions.count(counts)
        told = self._sessions.tell(ended)
        if self._watcher is not None:
            await self._save()
        await self._forget([*self._sessions.finished, *self._stale({*counts[0], *counts[1]})])
        return told

    async def kick(self, session_id: str) -> None:
        await self._sessions.end([session_id], "kicked")

    # --- watching ---

    async def _adopt(self) -> None:
        """The first time: those that an agent before this one let in."""
        if not self._adopted:
            await self._sessions.load()
            await self._take(await asyncio.to_thread(processes.all_sessions), admitted=True)
            await self._sessions.settle()
            self._adopted = True

    async def _watch(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._look()
                await self._miss_listener()
                failing = False
            except DriverError as error:
                if not failing:
                    log.warning("ssh sessions cannot be watched", error=str(error))
                failing = True
            await self._save()

    async def _save(self) -> None:
        """A full disk ends nobody's session: what is not written is told all the same, unless the agent is killed."""
        try:
            await self._sessions.save()
            self._saves_fail = False
        except OSError as error:
            if not self._saves_fail:
                log.warning("ssh sessions cannot be written", file=str(self._sessions.file), error=error.strerror)
            self._saves_fail = True

    async def _look(self) -> None:
        """Hold the sessions that have begun; those that may not go on are ended at once."""
        async with self._looking:
            if self._sshd.listener is not None:
                await self._take(await asyncio.to_thread(self._begun, self._sshd.listener))

    async def _miss_listener(self) -> None:
        """Tell that sshd has ended, so that it is started again before the next periodic look."""
        listener = self._sshd.listener
        if listener is not None and not await asyncio.to_thread(processes.lives, listener):
            self._sshd.listener = None
            log.warning("sshd has ended", pid=listener)
            self._notify()

    def _begun(self, listener: int) -> list[processes.Found]:
        new = [pid for pid in processes.children(listener) if pid not in self._sessions.monitors]
        return [found for pid in new if (found := processes.session_of(pid)) is not None]

    async def _take(self, found: Iterable[processes.Found], *, admitted: bool = False) -> None:
        found = list(found)
        if not found:
            return
        names = {login.uid: name for name, login in (await self._accounts.logins()).items()}
        for each in found:
            name = names.get(each.uid)
            record = self._sessions.add(each, name or each.name)
            if record is None:
                continue
            if name is None:
                reason: str | None = "its login is gone"
            elif await asyncio.to_thread(processes.is_of_another, each, self._sshd.config):
                reason = "it came in by another sshd of this host"
            else:
                reason = None if admitted else self._admit(name)
            if reason is not None:
                await self._sessions.end([record.id], reason)

    async def _throw_out(self, gone: Mapping[str, int]) -> None:
        """End all that sshd does for these users, by name and uid.

        The one who knew the password before it went may be about to be let in: his sshd has shown the name since before
        it compared them, so that a look in which nobody is found is the proof.
        """
        names, uids = set(gone), set(gone.values())
        deadline = time.monotonic() + _PATIENCE
        while names and (found := await asyncio.to_thread(processes.of_users, names, uids)):
            doomed = [id_ for id_, name in self._sessions.names().items() if name in names]
            await self._sessions.end(doomed, "its login is gone")
            for pid in found:
                processes.kill(pid)
            if time.monotonic() > deadline:
                raise DriverError(f"sshd still serves {', '.join(sorted(names))} {_PATIENCE:g} s after being killed")

    async def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None

    def _stale(self, connected: set[Client]) -> list[Client]:
        """Clients that have been connected, or were, for long without a session: scanners, wrong passwords."""
        now = time.monotonic()
        strangers = connected - self._sessions.clients
        self._strangers = {client: self._strangers.get(client, now) for client in strangers}
        return [client for client, since in self._strangers.items() if now - since > _STRANGER_SECONDS]

    async def _forget(self, clients: Sequence[Client]) -> None:
        if clients:
            try:
                await self._counters.forget(clients)
            except DriverError as error:  # what is left are counters of nobody, which expire by themselves
                log.warning("ssh counters cannot be taken away", error=str(error))


def _beyond(spec: SshServer | None, credentials: Iterable[Credential]) -> dict[str, str]:
    """Why some logins have no tun device; all else they can do."""
    if spec is None or not spec.tun:
        return {}
    most = spec.most_tunnels()
    return {
        each.username: f"it has no tun device: {spec.ipv4_pool} has addresses for {most}, and its number is "
        f"{each.tunnel}; give protocols.ssh.ipv4_pool a wider network"
        for each in credentials
        if each.tunnel > most
    }


def _addresses(spec: SshServer, processes_: Mapping[str, int]) -> dict[str, str]:
    """Where the clients are whose session's process has a tun device open. Blocks: reads /proc."""
    devices = {id_: processes.tun_of(pid) for id_, pid in processes_.items()}
    tunnels = {id_: spec.tunnel_of(device) for id_, device in devices.items() if device is not None}
    return {id_: str(tunnel.client) for id_, tunnel in tunnels.items() if tunnel is not None}
