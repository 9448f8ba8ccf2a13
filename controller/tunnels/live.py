"""Live connections: reports are counted in memory at once, and written to the database in batches."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple

import sqlalchemy as sa
import structlog

from controller.store.database import Committed, Database, StoreUnavailable, Topic
from controller.store.types import now as utc_now
from controller.tunnels.counters import Counters
from controller.tunnels.ledger import Entry, Ledger, Mark, Recorded
from controller.tunnels.metrics import Metrics
from controller.tunnels.status import Status, status
from controller.tunnels.tables import ConnectionRow, ReportMarkRow
from shared.protocol import Report

FLUSH_INTERVAL = 2.0  # seconds
_OVERLAP = timedelta(minutes=5)  # ended rows are looked for again so long: commits and clocks are not in one order
_CHUNK = 500  # engines limit the parameters of a statement

log = structlog.get_logger()

Stored = Callable[[str, int], None]


class Traffic(NamedTuple):
    """What is known of a live connection right now."""

    rx: int
    tx: int
    handshake_at: datetime | None


class LiveStates:
    """`load` before the first report, then `run` until the end. `record` never waits.

    Counters, sums and the node's newest report number are committed together, so a crash of the controller, a
    repeated report and a restarted node change no sum.
    """

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        *,
        max_bytes_per_second: int,
        interval: float = FLUSH_INTERVAL,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._interval = interval
        self._clock = clock
        self._ledger = Ledger(max_bytes_per_second)
        self._listeners: list[Stored] = []
        self._marked: set[str] = set()  # nodes whose mark has a row
        self._ends_moved = False
        self._ends_seen = clock()
        self._failing = False
        database.listen(self._committed)
        metrics.watch(self.count_states)

    def on_stored(self, listener: Stored) -> None:
        """Call `listener(node_id, sequence)` when reports up to that one are in the database, to be acknowledged."""
        self._listeners.append(listener)

    async def load(self) -> None:
        """Read where the last process stopped."""
        async with self._database.connect() as connection:
            for row in await connection.execute(_LIVE):
                self._ledger.add(_entry(row))
            for row in await connection.execute(sa.select(ReportMarkRow.__table__)):
                self._ledger.marks[row.node_id] = Mark(row.boot_id, row.sequence, row.former_boot_ids.split())
                self._marked.add(row.node_id)

    async def run(self) -> None:
        """Write what changed every few seconds, and at the end."""
        try:
            while True:
                await asyncio.sleep(self._interval)
                await self.flush()
        finally:
            await self.flush()

    def record(self, node_id: str, report: Report) -> None:
        """Count a report. A repeated or late one, and unknown peers, change nothing."""
        self._account(node_id, self._ledger.record(node_id, report, self._clock()))

    def begin(self, row: ConnectionRow) -> None:
        """A new connection is committed. What its peer counted before, for an earlier connection, is not its own."""
        entry = _entry(row)
        former = self._ledger.of_peer(entry.peer)
        if former is not None:
            entry.counters = former.counters.baseline()
            entry.last_handshake = former.last_handshake
            self._ledger.changed[entry.id] = entry
        self._ledger.add(entry)

    def get(self, connection_id: str) -> Traffic | None:
        """What is newer than the row, or None where nothing is."""
        entry = self._ledger.entries.get(connection_id)
        return Traffic(entry.counters.rx, entry.counters.tx, entry.handshake_at) if entry is not None else None

    def baseline(self, node_id: str, public_key: bytes) -> tuple[Counters, int] | None:
        """Where a new connection of this peer begins to count, and the handshake that is not its own."""
        entry = self._ledger.of_peer((node_id, public_key))
        return (entry.counters.baseline(), entry.last_handshake) if entry is not None else None

    def count_states(self) -> Mapping[Status, int]:
        now = self._clock()
        return Counter(status(None, entry.handshake_at, now) for entry in self._ledger.entries.values())

    async def wait_connected(self, connection_id: str, timeout: float) -> bool:
        """Wait for a live handshake; False where the time is over or the connection ends."""
        try:
            async with asyncio.timeout(timeout):
                while (entry := self._ledger.entries.get(connection_id)) is not None:
                    if status(None, entry.handshake_at, self._clock()) is Status.CONNECTED:
                        return True
                    if entry.heard is None:
                        entry.heard = asyncio.Event()
                    await entry.heard.wait()
        except TimeoutError:
            pass
        return False

    async def flush(self) -> None:
        """Write what changed since the last flush. What could not be written stays for the next one."""
        try:
            while self._ledger.unknown:
                await self._look_up()
            # No await between the look-up and taking the batch: marks and counts have to be of the same moment.
            await self._write()
            if self._ends_moved:
                await self._drop_ended()
        except StoreUnavailable:
            if not self._failing:
                log.warning("tunnels.flush_failed", connections=len(self._ledger.changed))
            self._failing = True
        else:
            if self._failing:
                log.info("tunnels.flush_restored")
            self._failing = False

    def _committed(self, committed: Committed) -> None:
        if Topic.CONNECTIONS in committed.topics:
            self._ends_moved = True

    def _account(self, node_id: str, recorded: Recorded) -> None:
        self._metrics.count_traffic(node_id, recorded.rx, recorded.tx)
        for entry in recorded.quarantined:
            self._metrics.count_quarantine()
            if not entry.quarantined:
                entry.quarantined = True
                log.warning("tunnels.counter_quarantined", connection_id=entry.id, node_id=node_id)

    async def _look_up(self) -> None:
        """Peers that are not in memory: another process may have made their connections."""
        nodes: defaultdict[str, list[bytes]] = defaultdict(list)
        for node_id, public_key in islice(self._ledger.unknown, _CHUNK):
            nodes[node_id].append(public_key)
        async with self._database.connect() as connection:
            for node_id, keys in nodes.items():
                rows = await connection.execute(
                    _LIVE.where(ConnectionRow.node_id == node_id, ConnectionRow.public_key.in_(keys))
                )
                self._account(node_id, self._ledger.adopt(node_id, keys, map(_entry, rows), self._clock()))

    async def _write(self) -> None:
        changed, self._ledger.changed = self._ledger.changed, {}
        reporting, self._ledger.reporting = self._ledger.reporting, set()
        if not changed and not reporting:
            return
        rows = [_row(entry) for _, entry in sorted(changed.items())]
        marks = {node_id: _mark(node_id, self._ledger.marks[node_id]) for node_id in sorted(reporting)}
        try:
            async with self._database.transaction() as tx:
                connection = await tx.session.connection()
                if rows:
                    await connection.execute(_UPDATE, rows)
                if known := [mark for node_id, mark in marks.items() if node_id in self._marked]:
                    await connection.execute(_UPDATE_MARK, known)
                if new := [mark for node_id, mark in marks.items() if node_id not in self._marked]:
                    await connection.execute(_INSERT_MARK, new)
        except BaseException:
            self._ledger.changed = changed | self._ledger.changed
            self._ledger.reporting |= reporting
            raise
        self._marked |= marks.keys()
        for node_id, mark in marks.items():
            for listener in self._listeners:
                listener(node_id, mark["new_sequence"])

    async def _drop_ended(self) -> None:
        """Forget connections that were ended, here or by another process, after their last counts are written."""
        self._ends_moved = False
        now = self._clock()
        try:
            async with self._database.connect() as connection:
                ended = await connection.execute(
                    sa.select(ConnectionRow.id).where(ConnectionRow.ended_at > self._ends_seen - _OVERLAP)
                )
        except StoreUnavailable:
            self._ends_moved = True
            raise
        self._ends_seen = now
        for row in ended:
            if row.id not in self._ledger.changed:
                self._ledger.drop(row.id)
            else:
                self._ends_moved = True


_COUNTS = ("generation", "last_rx", "last_tx", "last_handshake", "rx", "tx", "handshake_at")
_LIVE = sa.select(
    ConnectionRow.id,
    ConnectionRow.node_id,
    ConnectionRow.public_key,
    ConnectionRow.created_at,
    *(getattr(ConnectionRow, name) for name in _COUNTS),
).where(ConnectionRow.ended_at.is_(None))
_UPDATE = (
    sa.update(ConnectionRow.__table__)  # type: ignore[arg-type]
    .where(ConnectionRow.id == sa.bindparam("connection_id"))
    .values({name: sa.bindparam(f"new_{name}") for name in _COUNTS})
)
_MARK = ("boot_id", "sequence", "former_boot_ids")
_UPDATE_MARK = (
    sa.update(ReportMarkRow.__table__)  # type: ignore[arg-type]
    .where(ReportMarkRow.node_id == sa.bindparam("of_node"))
    .values({name: sa.bindparam(f"new_{name}") for name in _MARK})
)
_INSERT_MARK = sa.insert(ReportMarkRow.__table__).values(  # type: ignore[arg-type]
    {"node_id": sa.bindparam("of_node")} | {name: sa.bindparam(f"new_{name}") for name in _MARK}
)


def _entry(row: Any) -> Entry:
    """From a row of `_LIVE` or a whole ConnectionRow."""
    return Entry(
        id=row.id,
        peer=(row.node_id, row.public_key),
        counters=Counters(row.generation, row.last_rx, row.last_tx, row.rx, row.tx),
        last_handshake=row.last_handshake,
        handshake_at=row.handshake_at,
        counted_at=row.created_at,
    )


def _row(entry: Entry) -> dict[str, object]:
    counters = entry.counters
    return {
        "connection_id": entry.id,
        "new_generation": counters.generation,
        "new_last_rx": counters.last_rx,
        "new_last_tx": counters.last_tx,
        "new_last_handshake": entry.last_handshake,
        "new_rx": counters.rx,
        "new_tx": counters.tx,
        "new_handshake_at": entry.handshake_at,
    }


def _mark(node_id: str, mark: Mark) -> dict[str, Any]:
    return {
        "of_node": node_id,
        "new_boot_id": mark.boot_id,
        "new_sequence": mark.sequence,
        "new_former_boot_ids": " ".join(mark.former_boot_ids),
    }
