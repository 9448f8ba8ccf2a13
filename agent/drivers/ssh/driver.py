"""A second sshd for tunnels: its own configuration, host keys, port and process; the admin's own is never touched."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from agent.drivers import commands
from agent.drivers.base import Admit, DriverError, LiveSession, Notify, Unsupported
from agent.drivers.ssh import config, processes
from agent.drivers.ssh.accounts import Accounts
from agent.drivers.ssh.counters import Counters
from agent.drivers.ssh.passwd import GROUP
from agent.drivers.ssh.rules import Client
from agent.drivers.ssh.sessions import Sessions
from agent.errors import AgentError
from agent.files import make_private_directory, write_private
from shared.access import Credential
from shared.resource import Protocol
from shared.services import Server, SshServer

PROGRAM = "/usr/sbin/sshd"
_KEYS: Mapping[str, Callable[[], Ed25519PrivateKey | ec.EllipticCurvePrivateKey]] = {
    "ssh_host_ed25519_key": Ed25519PrivateKey.generate,
    "ssh_host_ecdsa_key": lambda: ec.generate_private_key(ec.SECP256R1()),
}
_PRIVILEGE_SEPARATION = Path("/run/sshd")  # sshd of Debian wants it, and only the admin's own service makes it
_LOOK_SECONDS = 0.25
_PATIENCE = 10.0  # seconds until a started sshd listens, or one that was told to end is gone
_STRANGER_SECONDS = 2.0 * config.LOGIN_GRACE  # a connection that is no session by then has failed to log in
_MAX_LOG_BYTES = 1 << 20
_log = structlog.get_logger(__name__)
_FATAL = ("Cannot bind any address", "fatal:")


class Ssh:
    """The ServiceDriver of SSH; `directory` is its own, and private."""

    protocol = Protocol.SSH

    def __init__(
        self, directory: Path, *, boot_id: str, admit: Admit, notify: Notify, etc: Path = Path("/etc")
    ) -> None:
        self._directory = directory
        self._config = directory / "sshd_config"
        self._running = directory / "sshd_config.running"  # what the sshd that runs has read
        self._pid_file = directory / "sshd.pid"
        self._log = directory / "sshd.log"
        self._admit = admit
        self._notify = notify
        self._accounts = Accounts(etc)
        self._counters = Counters()
        self._sessions = Sessions(directory / "sessions.json", self._log, boot_id, notify)
        self._listener: int | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._strangers: dict[Client, float] = {}  # who is connected and has no session, and since when

    async def host_keys(self) -> list[str]:
        """The public host keys as `type base64`; made at the first call."""
        return await asyncio.to_thread(self._host_keys)

    # --- the server ---

    async def ensure(self, spec: Server) -> None:
        if not isinstance(spec, SshServer):
            raise DriverError(f"{type(spec).__name__} is not for sshd")
        if spec.tun:
            raise Unsupported("tun devices over SSH are not offered here: turn `tun` off, and TCP forwarding on")
        if await asyncio.to_thread(shutil.which, PROGRAM) is None:
            raise Unsupported(f"{PROGRAM} (Debian package openssh-server) is not installed on this host")
        await self.host_keys()
        await self._accounts.prepare()
        wanted = config.render(
            spec,
            group=GROUP,
            host_keys=[self._directory / name for name in _KEYS],
            key_directory=self._accounts.key_directory,
            pid_file=self._pid_file,
        )
        if self._listener is None or not await asyncio.to_thread(processes.is_listener, self._listener, self._config):
            self._listener = await asyncio.to_thread(processes.find_listener, self._config)
        await self._counters.ensure(spec.port)
        if self._listener is None or await asyncio.to_thread(_text, self._running) != wanted:
            await self._run(wanted, spec.port)
        await asyncio.to_thread(self._log_size)
        if self._watcher is None:
            await self._adopt()
        else:
            await self._take(await asyncio.to_thread(processes.all_sessions))

    async def stop(self) -> None:
        await self._stop_watching()
        listener = self._listener or await asyncio.to_thread(processes.find_listener, self._config)
        if listener is not None:
            await self._end_listener(listener)
        await self._accounts.remove_all()
        await self._take(await asyncio.to_thread(processes.all_sessions))
        await self._sessions.end(self._sessions.names(), "the server was stopped")
        self._sessions.count(await self._counters.read())
        await self._counters.remove()
        for path in (self._config, self._running, self._pid_file, self._log, self._sessions.file):
            path.unlink(missing_ok=True)

    async def close(self) -> None:
        if self._watcher is not None:
            await self._stop_watching()
            await self._sessions.save()
        self._sessions.close()
        self._counters.close()

    # --- logins ---

    async def credentials(self) -> Mapping[str, Credential]:
        return await self._accounts.read()

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        return await self._accounts.put(credentials)

    async def remove(self, usernames: Sequence[str]) -> dict[str, str]:
        gone = await self._accounts.remove(usernames)
        await self._throw_out(gone)
        return {}

    # --- sessions ---

    async def sessions(self) -> list[LiveSession]:
        await self._look()
        ended = self._sessions.ended  # before the counters are read: these have no packet that comes later
        counts = await self._counters.read()
        self._sessions.count(counts)
        told = self._sessions.tell(ended)
        if self._watcher is not None:
            await self._sessions.save()
        await self._forget([*self._sessions.finished, *self._stale({*counts[0], *counts[1]})])
        return told

    async def kick(self, session_id: str) -> None:
        await self._sessions.end([session_id], "kicked")

    # --- starting and stopping ---

    async def _run(self, wanted: str, port: int) -> None:
        """Have an sshd run with this configuration; where it cannot, the one that ran before runs on."""
        await self._check(wanted)
        before = await asyncio.to_thread(_text, self._running)
        if f"Port {port}" not in before.split("\n") or self._listener is None:
            await asyncio.to_thread(_check_port, port)
        try:
            await self._load(wanted)
        except DriverError:
            if before and before != wanted:
                with contextlib.suppress(DriverError):  # the first error is the one to tell
                    await self._load(before)
            raise

    async def _check(self, wanted: str) -> None:
        candidate = self._config.with_suffix(".new")
        await asyncio.to_thread(_make_privilege_separation)
        await asyncio.to_thread(_write, candidate, wanted)
        try:
            await commands.run([PROGRAM, "-t", "-f", str(candidate)])
        finally:
            candidate.unlink(missing_ok=True)

    async def _load(self, text: str) -> None:
        """Start sshd, or let the one that runs read its file again: its process and sessions stay the same."""
        await asyncio.to_thread(_write, self._config, text)
        await asyncio.to_thread(self._running.unlink, missing_ok=True)
        await asyncio.to_thread(self._pid_file.unlink, missing_ok=True)
        written = await asyncio.to_thread(self._log_size)
        if self._listener is not None:
            os.kill(self._listener, signal.SIGHUP)
        else:
            await commands.run([PROGRAM, "-f", str(self._config), "-E", str(self._log)])
        try:
            self._listener = await self._listening(written)
        except DriverError:
            self._listener = await asyncio.to_thread(processes.find_listener, self._config)
            raise
        await asyncio.to_thread(_write, self._running, text)

    async def _listening(self, written: int) -> int:
        """Wait until sshd has opened its port, which is when it writes its number; raise with what it says."""
        deadline = time.monotonic() + _PATIENCE
        while not (pid := await asyncio.to_thread(_text, self._pid_file)).endswith("\n"):
            words = await asyncio.to_thread(self._log_since, written)
            if any(sign in words for sign in _FATAL) or time.monotonic() > deadline:
                raise DriverError(f"sshd does not start: {words or 'it says nothing'}")
            await asyncio.sleep(0.01)
        return int(pid)

    async def _end_listener(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while await asyncio.to_thread(processes.is_listener, pid, self._config):
            if time.monotonic() > deadline:
                raise DriverError(f"sshd (process {pid}) does not end")
            await asyncio.sleep(0.01)
        self._listener = None

    # --- watching ---

    async def _adopt(self) -> None:
        await self._sessions.load()
        await self._take(await asyncio.to_thread(processes.all_sessions), admitted=True)
        await self._sessions.settle()
        self._watcher = asyncio.create_task(self._watch(), name="ssh sessions")

    async def _watch(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._look()
                await self._sessions.save()
                failing = False
            except (DriverError, OSError) as error:
                if not failing:
                    _log.warning("ssh sessions cannot be watched", error=str(error))
                failing = True

    async def _look(self) -> None:
        """Hold the sessions that have begun; those that may not go on are ended at once."""
        async with self._looking:
            if self._listener is not None:
                await self._take(await asyncio.to_thread(self._begun, self._listener))

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
            elif await asyncio.to_thread(processes.is_of_another, each, self._config):
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
        while names and (found := await asyncio.to_thread(processes.of_users, names, uids)):
            doomed = [id_ for id_, name in self._sessions.names().items() if name in names]
            await self._sessions.end(doomed, "its login is gone")
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

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
                _log.warning("ssh counters cannot be taken away", error=str(error))

    # --- in a thread ---

    def _host_keys(self) -> list[str]:
        try:
            make_private_directory(self._directory)
            found = []
            for name, generate in _KEYS.items():
                path = self._directory / name
                if not path.exists():
                    key = generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
                    write_private(path, key)
                public = load_ssh_private_key(path.read_bytes(), None).public_key()
                found.append(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
            return found
        except (AgentError, OSError, ValueError) as error:
            raise DriverError(f"host keys of sshd: {error}") from error

    def _log_size(self) -> int:
        """Where the log ends; one that has grown large is emptied."""
        with contextlib.suppress(FileNotFoundError):
            size = self._log.stat().st_size
            if size <= _MAX_LOG_BYTES:
                return size
            os.truncate(self._log, 0)
        return 0

    def _log_since(self, offset: int) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._log.read_bytes()[offset:].decode(errors="replace").replace("\r\n", "; ").strip("; ")
        return ""


def _check_port(port: int) -> None:
    """Ask the kernel before anything is changed; sshd would go on with one IP version if it has only that."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
        try:
            with socket.socket(family, socket.SOCK_STREAM) as opened:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                opened.bind((address, port))
                opened.listen(1)
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                continue  # this host has no such addresses
            raise DriverError(f"sshd cannot have TCP port {port} of this host: {error.strerror}") from error


def _make_privilege_separation() -> None:
    try:
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise DriverError(f"{_PRIVILEGE_SEPARATION}, which sshd needs: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    try:
        write_private(path, text.encode())
    except AgentError as error:
        raise DriverError(str(error)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DriverError(f"{path}: {error.strerror}") from error
