"""The live sessions of our sshd: noticed, held, counted, ended.

A begin is looked for four times a second in the listener's list of children (one small read); the end of a process is
an event of its descriptor. What is known is kept on disk, so that a session that ends while no agent runs is still told
with its last count.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import msgspec

from agent.drivers.base import DriverError, LiveSession
from agent.drivers.ssh import config
from agent.drivers.ssh.processes import Found
from agent.drivers.ssh.rules import Client

_KILL_PATIENCE = 5.0  # seconds
_ID_BYTES = 16

Counts = tuple[Mapping[Client, int], Mapping[Client, int]]  # from and to each client


class Record(msgspec.Struct, kw_only=True):
    """A session, as it is kept on disk."""

    id: str
    username: str
    uid: int  # 0 = not known
    host: str
    port: int
    since: int
    rx: int = 0
    tx: int = 0
    seen: tuple[int, int] = (0, 0)  # the counters that rx and tx were brought up to date by
    ended: int = 0
    reason: str = ""
    address: str = ""  # of its tun device
    counted: bool = False  # to its end

    @property
    def client(self) -> Client:
        return Client(self.host, self.port)

    def count(self, counts: Counts) -> None:
        """A counter that fell was made anew (somebody flushed the host's rules): what it had is kept."""
        now = counts[0].get(self.client, 0), counts[1].get(self.client, 0)
        grown = [value - before if value >= before else value for value, before in zip(now, self.seen, strict=True)]
        self.rx, self.tx, self.seen = self.rx + grown[0], self.tx + grown[1], now

    def told(self) -> LiveSession:
        return LiveSession(
            id=self.id,
            username=self.username,
            remote=str(self.client),
            address=self.address,
            since=self.since,
            rx=self.rx,
            tx=self.tx,
            uid=self.uid or None,
            ended=self.ended,
            reason=self.reason,
        )


class _Kept(msgspec.Struct):
    boot: str
    logged: int  # bytes of sshd's log that tell of no other session
    records: list[Record]


@dataclass(slots=True)
class _Live:
    record: Record
    found: Found
    reason: str = ""
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Sessions:
    """Belongs to one event loop. `changed` is called after a begin or an end."""

    def __init__(self, file: Path, log: Path, boot_id: str, changed: Callable[[], None]) -> None:
        self.file = file
        self._log = log
        self._boot_id = boot_id
        self._changed = changed
        self._live: dict[str, _Live] = {}
        self._ended: dict[str, Record] = {}  # not told yet
        self._told: dict[str, Record] = {}  # told, but the caller may be killed before he has stored it
        self._logged = 0
        self._saving = asyncio.Lock()
        self.dirty = False

    @property
    def clients(self) -> set[Client]:
        """Of the sessions that are known."""
        return {record.client for record in self._records()}

    @property
    def monitors(self) -> set[int]:
        return {each.found.monitor.pid for each in self._live.values() if each.found.monitor is not None}

    @property
    def finished(self) -> set[Client]:
        """Whose counters nobody needs any more."""
        return {record.client for record in self._told.values()} - {live.record.client for live in self._live.values()}

    def names(self) -> dict[str, str]:
        """User names by session id."""
        return {id_: each.record.username for id_, each in self._live.items()}

    def without_address(self) -> dict[str, tuple[int, int]]:
        """The uid and process, by session id, of those that have no address inside (yet)."""
        return {
            id_: (each.found.uid, each.found.process.pid) for id_, each in self._live.items() if not each.record.address
        }

    def locate(self, addresses: Mapping[str, str]) -> None:
        """Note the addresses inside, by session id."""
        for id_, address in addresses.items():
            if id_ in self._live:
                self._live[id_].record.address, self.dirty = address, True

    async def load(self) -> None:
        """Take up what an earlier agent knew: call `add` with all that live, then `settle`; again where that fails."""
        kept = await asyncio.to_thread(self._read)
        if kept is not None and kept.boot == self._boot_id:
            self._ended = {each.id: each for each in kept.records if each.id not in self._live} | self._ended
            self._logged = kept.logged
        else:
            self._logged = await asyncio.to_thread(self._log_size)

    async def settle(self) -> None:
        """What is not alive has ended while nobody looked: of the sessions that were known, and of those in the log."""
        now, reason = int(time.time()), "ended while the agent did not run"
        for record in self._ended.values():
            if not record.ended:
                record.ended, record.reason = now, reason
        known = self.clients
        for name, host, port in config.accepted(await asyncio.to_thread(self._unread_log)):
            if Client(host, port) not in known:
                id_ = self._hash(f"missed {self._logged} {host} {port}")
                missed = Record(id=id_, username=name, uid=0, host=host, port=port, since=now, ended=now, reason=reason)
                self._ended[id_] = missed
        self.dirty = True

    def add(self, found: Found, username: str) -> Record | None:
        """Hold a session; None where it is held already, or has just ended."""
        id_ = self._id(found)
        if id_ in self._live:
            _release(found)
            return None
        client = found.client
        record = self._ended.pop(id_, None) or Record(
            id=id_, username=username, uid=found.uid, host=client.host, port=client.port, since=found.since
        )
        for former in self._ended.values():
            if former.client == client:  # the port is in use again: from here on the counter is the new session's
                record.seen, former.counted = former.seen, True
        self._live[id_] = _Live(record, found)
        self.dirty = True
        asyncio.get_running_loop().add_reader(found.process.descriptor, self._process_ended, id_)
        self._changed()
        return record

    @property
    def ended(self) -> set[str]:
        """The ids of those that nobody has been told of."""
        return set(self._ended)

    def count(self, counts: Counts) -> None:
        """Bring all records up to date."""
        for record in [*(live.record for live in self._live.values()), *self._ended.values()]:
            if not record.counted:
                record.count(counts)

    def tell(self, ended: Set[str]) -> list[LiveSession]:
        """All that live, and once each of these that have ended: those of which nothing is to be counted any more."""
        self._told = {id_: self._ended.pop(id_) for id_ in ended if id_ in self._ended}
        for record in self._told.values():
            record.counted = True
        self.dirty = self.dirty or bool(self._told)
        return [record.told() for record in (*(live.record for live in self._live.values()), *self._told.values())]

    async def end(self, ids: Iterable[str], reason: str) -> None:
        """Kill these sessions; after the return their processes are gone."""
        ending = [live for id_ in ids if (live := self._live.get(id_)) is not None]
        for live in ending:
            live.reason = live.reason or reason
            live.found.process.kill()
            if live.found.monitor is not None:
                live.found.monitor.kill()
        try:
            async with asyncio.timeout(_KILL_PATIENCE):
                for live in ending:
                    await live.gone.wait()
        except TimeoutError as error:
            raise DriverError(f"a session of sshd does not end within {_KILL_PATIENCE:g} s of being killed") from error

    async def save(self) -> None:
        """Write what has changed; raise OSError."""
        async with self._saving:
            if self.dirty:
                logged = await asyncio.to_thread(self._log_size)  # before: a begin in between is told twice, not never
                data = msgspec.json.encode(_Kept(self._boot_id, logged, self._records()))
                self.dirty = False
                try:
                    await asyncio.to_thread(self._write, data)
                except OSError:
                    self.dirty = True
                    raise

    def close(self) -> None:
        """Let go of all; they live on."""
        for live in self._live.values():
            asyncio.get_running_loop().remove_reader(live.found.process.descriptor)
            _release(live.found)
        self._live.clear()

    def _records(self) -> list[Record]:
        return [*(live.record for live in self._live.values()), *self._ended.values(), *self._told.values()]

    def _process_ended(self, id_: str) -> None:
        live = self._live.pop(id_)
        asyncio.get_running_loop().remove_reader(live.found.process.descriptor)
        _release(live.found)
        live.record.ended = max(int(time.time()), 1)
        live.record.reason = live.reason or "disconnected"
        self._ended[id_] = live.record
        self.dirty = True
        live.gone.set()
        self._changed()

    def _id(self, found: Found) -> str:
        return self._hash(f"{found.process.pid} {found.process.started}")

    def _hash(self, text: str) -> str:
        return blake2b(f"ssh {self._boot_id} {text}".encode(), digest_size=_ID_BYTES).hexdigest()

    def _read(self) -> _Kept | None:
        try:
            return msgspec.json.decode(self.file.read_bytes(), type=_Kept)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _write(self, data: bytes) -> None:
        """Not synced: after a crash of the host none of these sessions lives, and its counters are gone, too."""
        temporary = self.file.with_suffix(".new")
        temporary.write_bytes(data)
        temporary.chmod(0o600)
        temporary.replace(self.file)

    def _log_size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._log.stat().st_size
        return 0

    def _unread_log(self) -> bytes:
        """What sshd has said since the last writing; from its beginning where it was emptied since then."""
        with contextlib.suppress(FileNotFoundError):
            data = self._log.read_bytes()
            return data[self._logged :] if self._logged <= len(data) else data
        return b""


def _release(found: Found) -> None:
    for process in (found.process, found.monitor):
        if process is not None:
            with contextlib.suppress(OSError):
                process.close()
