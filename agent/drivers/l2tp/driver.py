"""The ServiceDriver of L2TP/IPsec: servers, logins and sessions of one host."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.drivers import commands
from agent.drivers.base import Admit, DriverError, LiveSession, Notify, Unsupported
from agent.drivers.l2tp import charon, xl2tpd
from agent.drivers.l2tp.charon import Charon
from agent.drivers.l2tp.files import SESSIONS, TABLE, refusal, ruleset
from agent.drivers.l2tp.links import PppLink, PppLinks
from agent.drivers.l2tp.processes import end
from agent.drivers.l2tp.records import Records, Secrets
from agent.drivers.l2tp.sessions import Record, interfaces
from agent.drivers.l2tp.xl2tpd import Xl2tpd
from shared.access import Credential
from shared.resource import Protocol
from shared.services import L2TP_PORT, L2tpServer, Server

_PPPOX, _PPPOL2TP = 24, 1  # socket(2)'s family and protocol, linux/if_pppox.h
_PACKAGES = {
    charon.PROGRAM: "charon-systemd",
    charon.CRYPTOGRAPHY: "libstrongswan-standard-plugins",
    xl2tpd.PROGRAM: "xl2tpd",
    xl2tpd.PPPD: "ppp",
}


@dataclass(slots=True)
class _Seen:
    """What we know of a session that was alive when we looked."""

    record: Record
    rx: int = 0
    tx: int = 0
    gone: bool = False  # its interface is, and the counters are the last ones

    def count(self, link: PppLink) -> None:
        self.rx, self.tx = max(self.rx, link.rx), max(self.tx, link.tx)


class L2tp:
    """`directory` is ours alone, on a file system that outlives the agent; it holds the clients' passwords."""

    def __init__(self, directory: Path, *, boot_id: str, admit: Admit, notify: Notify) -> None:
        self._directory = directory
        self._admit = admit
        self._notify = notify
        self._charon = Charon(directory)
        self._xl2tpd = Xl2tpd(directory / "ppp")
        self._secrets = Secrets(directory / "ppp" / "chap-secrets")
        self._records = Records(directory / "ppp" / SESSIONS, boot_id)
        self._links: PppLinks | None = None
        self._seen: dict[str, _Seen] = {}
        self._told: set[str] = set()  # ended ones; their records go at the next look, should this answer be lost
        self._refused: set[str] = set()
        self._logins: frozenset[str] | None = None  # as chap-secrets has them
        self._adopting = True  # the sessions of the first look were let in before we came

    @property
    def protocol(self) -> Protocol:
        return Protocol.L2TP

    # --- the servers ---

    async def ensure(self, spec: Server) -> None:
        if not isinstance(spec, L2tpServer):
            raise DriverError(f"the L2TP driver cannot run {spec!r}")
        self._watch_links()
        running = self._xl2tpd.running(spec)
        if not running or not self._charon.running():
            await asyncio.to_thread(self._prepare)
        if not running:
            await self._xl2tpd.check(spec)
        await self._filter()  # before anything listens
        await self._charon.ensure(spec.psk, self._notify)
        if not running:
            await self._xl2tpd.stop()
            await self._end_all()
            await self._xl2tpd.start(spec)
        self._xl2tpd.watch(self._notify)

    async def stop(self) -> None:
        await self._xl2tpd.stop()
        await self._end_all()
        await self._charon.stop()
        with contextlib.suppress(DriverError):  # it is not there
            await commands.run(["nft", "delete", "table", *TABLE.split()])
        self._logins = frozenset()
        await asyncio.to_thread(self._delete_files)

    def _prepare(self) -> None:
        """What must be there before something is started. Blocks."""
        for program, package in _PACKAGES.items():
            if not Path(program).exists():
                raise Unsupported(f"{program} is not installed on this host: install the Debian package {package}")
        try:
            socket.socket(_PPPOX, socket.SOCK_DGRAM, _PPPOL2TP).close()
        except OSError as error:
            raise Unsupported(
                f"this host's kernel has no L2TP ({error.strerror}): it needs the modules l2tp_ppp and esp4"
            ) from error
        if not self._charon.running():
            for port in charon.PORTS:
                _check_port(port, "IKE daemon")
        if not self._xl2tpd.running():
            _check_port(L2TP_PORT, "L2TP server")
        self._xl2tpd.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def _filter(self) -> None:
        try:
            await commands.run(["nft", "list", "table", *TABLE.split()])
        except Unsupported:
            raise
        except DriverError:
            await commands.run(["nft", "-f", "-"], stdin=ruleset())

    def _delete_files(self) -> None:
        """All but the records of sessions whose end was not told yet."""
        for path in (*self._directory.glob("*"), *self._xl2tpd.directory.glob("*")):
            if not path.is_dir():
                path.unlink(missing_ok=True)

    # --- logins ---

    async def credentials(self) -> Mapping[str, Credential]:
        secrets = await self._read_secrets()
        return {
            name: Credential(protocol=Protocol.L2TP, username=name, account=0, secret=secret)
            for name, secret in secrets.items()
        }

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        refused = {
            credential.username: words
            for credential in credentials
            if (words := refusal(credential.secret)) is not None
        }
        secrets = await self._read_secrets()
        changed = secrets | {
            credential.username: credential.secret for credential in credentials if credential.username not in refused
        }
        await self._write_secrets(secrets, changed)
        return refused

    async def remove(self, usernames: Sequence[str]) -> dict[str, str]:
        leaving = set(usernames)
        secrets = await self._read_secrets()
        await self._write_secrets(secrets, {name: value for name, value in secrets.items() if name not in leaving})
        await self._end(record for record in await self._read_records() if record.username in leaving)
        return {}

    async def _read_secrets(self) -> dict[str, str]:
        secrets = await asyncio.to_thread(self._secrets.read)
        self._logins = frozenset(secrets)
        return secrets

    async def _write_secrets(self, before: dict[str, str], after: dict[str, str]) -> None:
        if before == after:
            return
        self._xl2tpd.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        await asyncio.to_thread(self._secrets.write, after)
        self._logins = frozenset(after)

    # --- sessions ---

    async def sessions(self) -> list[LiveSession]:
        if self._logins is None:
            await self._read_secrets()
        self._watch_links()
        records = await self._read_records()
        records = await self._forget_told(records)
        # Both after the records: a session that begins meanwhile is not among them.
        links = await self._links.list() if records and self._links is not None else {}
        living = interfaces((record for record in records if record.process.alive), links)
        unwanted = [record for record in records if record.id in living and not self._welcome(record)]
        await self._end(unwanted)
        self._adopting = False
        return [session for record in records if (session := self._session(record, living.get(record.id))) is not None]

    async def kick(self, session_id: str) -> None:
        await self._end(record for record in await self._read_records() if record.id == session_id)

    async def close(self) -> None:
        if self._links is not None:
            self._links.close()
            self._links = None
        self._charon.close()
        self._xl2tpd.close()

    def _welcome(self, record: Record) -> bool:
        """Whether it may stay. One that was let in by a login which is gone by now may not."""
        if self._logins is not None and record.username not in self._logins:
            return False
        if record.id in self._refused:
            return False
        if record.id not in self._seen and not self._adopting and self._admit(record.username) is not None:
            self._refused.add(record.id)
            return False
        return True

    def _session(self, record: Record, link: PppLink | None) -> LiveSession | None:
        """How it is told; None where it was never let in."""
        if record.id in self._refused:
            self._told.add(record.id)
            return None
        seen = self._seen.setdefault(record.id, _Seen(record))
        if link is not None and not seen.gone:
            seen.count(link)
            return record.session(seen.rx, seen.tx)
        final = record.final
        if final is not None and not seen.gone:
            seen.rx, seen.tx = max(seen.rx, final.rx), max(seen.tx, final.tx)
        self._told.add(record.id)
        return record.session(seen.rx, seen.tx, ended=final.at if final is not None else int(time.time()))

    async def _forget_told(self, records: list[Record]) -> list[Record]:
        for record in records:
            if record.id in self._told:
                await asyncio.to_thread(self._records.delete, record)
                self._seen.pop(record.id, None)
                self._refused.discard(record.id)
        left = [record for record in records if record.id not in self._told]
        self._told.clear()
        return left

    async def _read_records(self) -> list[Record]:
        return await asyncio.to_thread(self._records.read)

    async def _end_all(self) -> None:
        await self._end(await self._read_records())

    async def _end(self, records: Iterable[Record]) -> None:
        await end([record.process for record in records])

    def _watch_links(self) -> None:
        if self._links is None:
            self._links = PppLinks(lambda _link: self._notify(), self._gone, self._notify)

    def _gone(self, link: PppLink) -> None:
        for seen in self._seen.values():
            if seen.record.interface == link.name and not seen.gone:
                seen.count(link)
                seen.gone = True
        self._notify()


def _check_port(port: int, what: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise DriverError(f"UDP port {port} cannot be used: {error.strerror}") from error
            raise DriverError(
                f"UDP port {port} is in use: another {what} runs on this host; stop it, or take l2tp off this node"
            ) from error
