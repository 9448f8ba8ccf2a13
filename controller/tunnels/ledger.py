"""Counts what nodes report of their peers; in memory, without a clock or a database of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from controller.tunnels.counters import MAX_COUNT, Counters, count, plausible
from shared.keys import KEY_BYTES
from shared.protocol import PeerStats, Report
from shared.resource import Protocol

_FORMER_BOOTS = 8
_MAX_UNKNOWN = 20_000

PeerKey = tuple[str, bytes]  # node id, public key


@dataclass(slots=True)
class Entry:
    """A live connection. `last_handshake` is the peer's as reported, `handshake_at` only this connection's own.

    Of other protocols than WireGuard both counters and `handshake_at` (the last sign of life) are of its sessions.
    """

    id: str
    user_id: str
    protocol: str
    peer: PeerKey
    counters: Counters
    last_handshake: int  # Unix seconds, 0 = never
    handshake_at: datetime | None
    counted_at: datetime
    quarantined: bool = False


@dataclass(slots=True)
class Mark:
    """How far a node's reports are counted."""

    boot_id: str
    sequence: int
    former_boot_ids: list[str] = field(default_factory=list)

    def advance(self, report: Report) -> bool:
        """Whether the report is new. One of a former boot comes too late for ever, its counters are gone."""
        if report.boot_id == self.boot_id:
            if report.sequence <= self.sequence:
                return False
        else:
            if report.boot_id in self.former_boot_ids:
                return False
            self.former_boot_ids = [*self.former_boot_ids, self.boot_id][-_FORMER_BOOTS:]
        self.boot_id, self.sequence = report.boot_id, report.sequence
        return True


@dataclass(slots=True)
class Moved:
    """What came of one peer's sample."""

    entry: Entry
    rx: int
    tx: int
    heard: bool  # from the client: bytes or a handshake
    remote: str


@dataclass(slots=True)
class Recorded:
    """What a report brought."""

    new: bool = True  # False = it was counted before
    moved: list[Moved] = field(default_factory=list)
    quarantined: list[Entry] = field(default_factory=list)


class Ledger:
    def __init__(self, max_bytes_per_second: int) -> None:
        self._max_bytes_per_second = max_bytes_per_second
        self.entries: dict[str, Entry] = {}  # by connection id
        self.marks: dict[str, Mark] = {}  # by node id
        self.unknown: dict[PeerKey, tuple[str, PeerStats]] = {}  # generation and newest sample of peers not in here
        self.changed: dict[str, Entry] = {}
        self.reporting: set[str] = set()  # nodes with reports that are not stored yet
        self._peers: dict[PeerKey, Entry] = {}

    def add(self, entry: Entry) -> None:
        self.entries[entry.id] = entry
        self._peers[entry.peer] = entry

    def of_peer(self, peer: PeerKey) -> Entry | None:
        return self._peers.get(peer)

    def drop(self, connection_id: str) -> None:
        entry = self.entries.pop(connection_id, None)
        if entry is None:
            return
        if self._peers.get(entry.peer) is entry:
            del self._peers[entry.peer]

    def nodes(self) -> set[str]:
        return {entry.peer[0] for entry in self.entries.values()} | self.marks.keys()

    def forget_nodes(self, node_ids: Collection[str]) -> None:
        """They were deleted, with their connections."""
        for entry in list(self.entries.values()):
            if entry.peer[0] in node_ids:
                self.drop(entry.id)
                self.changed.pop(entry.id, None)
        for node_id in node_ids:
            self.marks.pop(node_id, None)
        self.reporting.difference_update(node_ids)

    def record(self, node_id: str, report: Report, now: datetime) -> Recorded:
        self.reporting.add(node_id)
        recorded = Recorded()
        mark = self.marks.get(node_id)
        if mark is None:
            self.marks[node_id] = Mark(report.boot_id, report.sequence)
        elif not mark.advance(report):
            return Recorded(new=False)
        for sample in report.peers:
            entry = self._peers.get((node_id, sample.public_key))
            if entry is not None:
                self._count(entry, report.generation, sample, now, recorded)
            elif len(sample.public_key) == KEY_BYTES and len(self.unknown) < _MAX_UNKNOWN:
                self.unknown[node_id, sample.public_key] = report.generation, sample
        return recorded

    def adopt(self, node_id: str, public_keys: Iterable[bytes], found: Iterable[Entry], now: datetime) -> Recorded:
        """Take in the entries found for unknown peers, with what was reported of them; the other keys are nobody's."""
        recorded = Recorded()
        for entry in found:
            if entry.peer not in self._peers:  # it may have begun here meanwhile
                self.add(entry)
                generation, sample = self.unknown[entry.peer]
                self._count(entry, generation, sample, now, recorded)
        for public_key in public_keys:
            self.unknown.pop((node_id, public_key), None)
        return recorded

    def serve(self, connection_id: str, rx: int, tx: int, now: datetime) -> None:
        """A session of the connection moved bytes, or at least lives."""
        entry = self.entries.get(connection_id)
        if entry is None or entry.protocol == Protocol.WIREGUARD:
            return
        former = entry.counters
        entry.counters = replace(former, rx=min(former.rx + rx, MAX_COUNT), tx=min(former.tx + tx, MAX_COUNT))
        entry.handshake_at = now
        self.changed[entry.id] = entry

    def _count(self, entry: Entry, generation: str, sample: PeerStats, now: datetime, recorded: Recorded) -> None:
        before = entry.counters
        after = count(before, generation, sample.rx, sample.tx)
        if plausible(before, after, (now - entry.counted_at).total_seconds(), self._max_bytes_per_second):
            entry.counters, entry.counted_at = after, now
        else:
            after = before
            recorded.quarantined.append(entry)
        heard = after.rx > before.rx
        handshake = min(sample.handshake, int(now.timestamp()))  # a node's clock may be ahead, or absurd
        if handshake > entry.last_handshake:
            entry.last_handshake = handshake
            entry.handshake_at = datetime.fromtimestamp(handshake, UTC)
            heard = True
        recorded.moved.append(Moved(entry, after.rx - before.rx, after.tx - before.tx, heard, sample.endpoint))
        self.changed[entry.id] = entry
