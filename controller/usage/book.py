"""Sessions and the bytes that they moved; in memory, without a clock or a database of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from controller.usage.entries import Batch, Counted, Entry, Key, RollCall
from shared.protocol import Report, SessionStats
from shared.resource import Protocol

SILENCE = 180  # seconds without a sign of life end an inferred session; a live tunnel shakes hands every 120
HOUR = 3600
MAX_STRANGE = 100_000  # of one node
_GRACE = 10.0  # seconds; reports may be held up and then come close together
LONGEST = 30 * 24 * HOUR  # seconds that a session may have counted before it is heard of
_MAX_ID = 64
_MOST_USED = 2**62  # an allowance is more, and has to fit its column too
_EXACT = frozenset(Protocol) - {Protocol.WIREGUARD}

_K = TypeVar("_K")


class Book:
    def __init__(self, max_bytes_per_second: int, new_id: Callable[[], str]) -> None:
        self._max_bytes_per_second = max_bytes_per_second
        self._new_id = new_id
        self.strange: dict[str, dict[str, SessionStats]] = {}  # node -> id -> newest sample, to be looked up
        self.calls: dict[str, RollCall] = {}  # node -> what it said; its sessions are to be read anew
        self._nodes: dict[str, dict[str, Entry]] = {}
        self._users: dict[str, dict[Key, Entry]] = {}
        self._connections: dict[str, dict[Key, Entry]] = {}
        self._batch = Batch()

    def __iter__(self) -> Iterator[Entry]:
        for entries in list(self._nodes.values()):
            yield from list(entries.values())

    def of_user(self, user_id: str) -> Collection[Entry]:
        return self._users.get(user_id, {}).values()

    def of_node(self, node_id: str) -> Collection[Entry]:
        return self._nodes.get(node_id, {}).values()

    def of_connection(self, connection_id: str) -> Collection[Entry]:
        return self._connections.get(connection_id, {}).values()

    def get(self, node_id: str, session_id: str) -> Entry | None:
        return self._nodes.get(node_id, {}).get(session_id)

    def counts(self) -> Mapping[tuple[str, str], int]:
        """(node id, protocol) -> sessions; also from another thread, for metrics."""
        return Counter((entry.node_id, entry.protocol) for entry in self)

    def add(self, entry: Entry) -> None:
        self._nodes.setdefault(entry.node_id, {})[entry.id] = entry
        self._users.setdefault(entry.user_id, {})[entry.key] = entry
        if entry.connection_id is not None:
            self._connections.setdefault(entry.connection_id, {})[entry.key] = entry

    def record(self, node_id: str, report: Report, now: float) -> Counted:
        """Count a report that is new."""
        counted = Counted(self._batch.sessions.setdefault(node_id, {}))
        if report.complete:
            # A link begins: another controller may have counted this node meanwhile, and the node may have lost its
            # disk. What is said of it is compared with the database before anything is counted.
            self.calls[node_id] = RollCall(set())
            self._batch.used = {key: used for key, used in self._batch.used.items() if key[0] != node_id}
        call = self.calls.get(node_id)
        if call is not None:
            call.present.update(sample.id for sample in report.sessions)
        entries = self._nodes.get(node_id, {}) if call is None else {}
        for sample in report.sessions:
            entry = entries.get(sample.id)
            if entry is not None and entry.exact:
                self._count(entry, sample, now, counted)
            elif not _fit(sample):
                counted.refused += 1
            else:
                strange = self.strange.setdefault(node_id, {})
                if len(strange) < MAX_STRANGE or sample.id in strange:
                    strange[sample.id] = sample
        for usage in report.usage:
            if usage.used <= _MOST_USED:
                key = node_id, usage.account
                self._batch.used[key] = max(self._batch.used.get(key, 0), usage.used)
        return counted

    def adopt(
        self,
        node_id: str,
        asked: Collection[str],
        call: RollCall | None,
        found: Iterable[Entry],
        owners: Mapping[str, str],
        now: float,
    ) -> Counted:
        """Take in what the database has of a node's strange sessions, and count what was said of them.

        `owners` has the user of each session that may be new; the others are nobody's. After a roll call `found` has
        all that are open in the database, and those that the node does not have any more end.
        """
        counted = Counted(self._batch.sessions.setdefault(node_id, {}))
        if call is not None and self.calls.get(node_id) is call:
            del self.calls[node_id]
        else:
            call = None
        ended: dict[str, Entry] = {}
        unwritten = self._batch.sessions.get(node_id, {})  # among them some that have ended, which the database lacks
        for stored in found:
            entry = self.get(node_id, stored.id) or unwritten.get(stored.id)
            if entry is not None:
                entry.rx, entry.tx = max(entry.rx, stored.rx), max(entry.tx, stored.tx)
            elif stored.ended:
                ended[stored.id] = stored
            else:
                self.add(stored)
        strange = self.strange.get(node_id, {})
        for session_id in asked:
            sample = strange.pop(session_id, None)
            if sample is None:
                continue
            entry = self.get(node_id, session_id)
            if entry is None:
                entry = self._reopened(unwritten.get(session_id) or ended.get(session_id))
            if entry is None and session_id in owners:
                entry = _entry(node_id, owners[session_id], sample, now)
                self.add(entry)
            if entry is None or not entry.exact:
                counted.refused += 1
            else:
                self._count(entry, sample, now, counted)
        if not strange:
            self.strange.pop(node_id, None)
        if call is not None:
            gone = [entry for entry in self.of_node(node_id) if entry.exact and entry.id not in call.present]
            for entry in gone:
                self.end(entry, int(now), "lost")
        return counted

    def infer(
        self,
        connection_id: str,
        user_id: str,
        node_id: str,
        *,
        rx: int,
        tx: int,
        heard: bool,
        handshake: int,
        remote: str,
        now: float,
    ) -> None:
        """A WireGuard connection moved bytes; `heard` = from the client. `handshake`: Unix seconds, 0 = never."""
        if rx or tx:
            self._batch.move((node_id, Protocol.WIREGUARD, int(now) // HOUR * HOUR), user_id, rx, tx)
        entry = next(iter(self.of_connection(connection_id)), None)
        if entry is None:
            if not heard or not handshake:
                return
            entry = Entry(
                node_id, self._new_id(), user_id, Protocol.WIREGUARD, "", connection_id, "", "", handshake, exact=False
            )
            self.add(entry)
        entry.rx, entry.tx = entry.rx + rx, entry.tx + tx
        if heard:
            entry.heard = now
            entry.remote = remote if remote.isprintable() else ""
        self._batch.change(entry)

    def end_silent(self, now: float) -> None:
        silent = [entry for entry in self if not entry.exact and now - entry.heard >= SILENCE]
        for entry in silent:
            self.end(entry, int(entry.heard), "silent")

    def end_connection(self, connection_id: str, moment: int, reason: str) -> bool:
        """The WireGuard connection ended; of other protocols the node says when their sessions end."""
        ended = [entry for entry in self.of_connection(connection_id) if not entry.exact]
        for entry in ended:
            self.end(entry, moment, reason)
        return bool(ended)

    def end(self, entry: Entry, moment: int, reason: str) -> None:
        entry.ended, entry.reason = max(moment, entry.since), reason
        self._drop(entry)
        self._batch.change(entry)

    def forget_users(self, user_ids: Collection[str]) -> None:
        """They were deleted, with all that was stored of them."""
        for user_id in user_ids:
            for entry in list(self.of_user(user_id)):
                self._drop(entry)
        self._batch = self._batch.without(user_ids)

    def end_nodes(self, node_ids: Collection[str], moment: int, reason: str) -> None:
        """Nobody will ever tell of their sessions again."""
        for node_id in node_ids:
            for entry in list(self.of_node(node_id)):
                self.end(entry, moment, reason)
            self.strange.pop(node_id, None)
            self.calls.pop(node_id, None)

    def nodes(self) -> set[str]:
        """Those with live sessions."""
        return set(self._nodes)

    def take(self) -> Batch:
        """What changed since the last call; `put_back` where it could not be written."""
        taken, self._batch = self._batch, Batch()
        return taken

    def written(self, batch: Batch) -> None:
        for sessions in batch.sessions.values():
            for entry in sessions.values():
                entry.stored, entry.reopened = True, False

    def put_back(self, batch: Batch) -> None:
        newer, self._batch = self._batch, batch
        for sessions in newer.sessions.values():
            for entry in sessions.values():
                batch.change(entry)
        for place, moved in newer.moved.items():
            for user_id, (rx, tx) in moved.items():
                batch.move(place, user_id, rx, tx)
        for lease, used in newer.used.items():
            batch.used[lease] = max(batch.used.get(lease, 0), used)

    def _count(self, entry: Entry, sample: SessionStats, now: float, counted: Counted) -> None:
        """The one path that runs for every session of every report: it calls as little as it can."""
        rx, tx = sample.rx - entry.rx, sample.tx - entry.tx
        if rx > 0 or tx > 0:
            rx, tx = rx if rx > 0 else 0, tx if tx > 0 else 0  # a falling counter is no news
            seconds = now - entry.heard if now > entry.heard else 0.0
            possible = self._max_bytes_per_second * (seconds + _GRACE)
            if rx <= possible and tx <= possible:
                entry.rx += rx
                entry.tx += tx
                entry.heard = now
                moved = counted.moved.get(entry.protocol)
                if moved is None:
                    place = entry.node_id, entry.protocol, int(now) // HOUR * HOUR
                    moved = counted.moved[entry.protocol] = self._batch.moved.setdefault(place, {})
                former = moved.get(entry.user_id)
                moved[entry.user_id] = (rx, tx) if former is None else (former[0] + rx, former[1] + tx)
                counted.rx[entry.protocol] += rx
                counted.tx[entry.protocol] += tx
            else:
                rx = tx = 0
                counted.quarantined.append(entry)
        else:
            rx = tx = 0
        counted.changed[entry.id] = entry
        if entry.connection_id is not None:
            counted.connections.append((entry.connection_id, rx, tx))
        if sample.ended:
            counted.news = True
            self.end(entry, min(sample.ended, int(now)), _text(sample.reason))

    def _reopened(self, entry: Entry | None) -> Entry | None:
        """One that was given up too early: the node still has news of it."""
        if entry is not None:
            entry.ended, entry.reason, entry.reopened = 0, "", True
            self.add(entry)
        return entry

    def _drop(self, entry: Entry) -> None:
        _remove(self._nodes, entry.node_id, entry.id)
        _remove(self._users, entry.user_id, entry.key)
        if entry.connection_id is not None:
            _remove(self._connections, entry.connection_id, entry.key)


def _remove(index: dict[str, dict[_K, Entry]], name: str, key: _K) -> None:
    held = index.get(name)
    if held is not None:
        held.pop(key, None)
        if not held:
            del index[name]


def _fit(sample: SessionStats) -> bool:
    """Whether it can be stored; a node may be broken, or somebody else's by now."""
    names = sample.id.isprintable() and sample.username.isprintable() and sample.connection.isprintable()
    return names and 1 <= len(sample.id) <= _MAX_ID and sample.protocol in _EXACT


def _text(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _entry(node_id: str, user_id: str, sample: SessionStats, now: float) -> Entry:
    since = min(sample.since, int(now))
    return Entry(
        node_id,
        sample.id,
        user_id,
        sample.protocol,
        sample.username,
        sample.connection or None,
        _text(sample.remote),
        _text(sample.address),
        since,
        exact=True,
        heard=max(since, now - LONGEST),
    )
