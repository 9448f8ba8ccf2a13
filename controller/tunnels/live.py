"""Live connections and sessions: reports are counted in memory at once, and written to the database in batches."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import NamedTuple

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.access.owners import owners
from controller.accounts import rows as accounts
from controller.fleet import census
from controller.store.database import Committed, Database, StoreUnavailable, Topic
from controller.store.types import new_id
from controller.store.types import now as utc_now
from controller.tunnels.counters import Counters
from controller.tunnels.ledger import Entry, Ledger, Mark, Recorded
from controller.tunnels.metrics import Metrics
from controller.tunnels.reported import LIVE, NOTE_MARK, UPDATE, entry_from_row, mark_of, row_of, users_of
from controller.tunnels.status import Status, status
from controller.tunnels.tables import ConnectionRow, ReportMarkRow
from controller.usage.book import Book
from controller.usage.entries import Counted
from controller.usage.records import Changes, Records, Written
from shared.protocol import Report
from shared.resource import Protocol

FLUSH_INTERVAL = 2.0  # seconds
LAST_FLUSH = 10.0  # seconds that the end waits for it
# Seconds after something that somebody waits for: a session began or ended, an allowance is being used up. A node
# tells the last counters of a peer that it removes within that time: they still count.
_HURRY = 0.25
_OVERLAP = timedelta(minutes=5)  # ended rows are looked for again so long: commits and clocks are not in one order
_COUNT_KEPT = timedelta(seconds=2)
_CHUNK = 500  # engines limit the parameters of a statement
_MANY = 20_000  # sessions that are looked up at a time

log = structlog.get_logger()

Stored = Callable[[str, int], None]
OnWritten = Callable[[Written], None]


class Traffic(NamedTuple):
    """What is known of a live connection right now."""

    rx: int
    tx: int
    handshake_at: datetime | None  # of other protocols: the last sign of life
    live: bool | None = None  # whether it has a session; None = WireGuard, by the handshake


class LiveStates:
    """`load` before the first report, then `run` until the end. `record` never waits.

    Counters, sessions, sums and the node's newest report number are committed together, so a crash of the controller,
    a repeated report and a restarted node change no sum.
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
        self.book = Book(max_bytes_per_second, new_id)
        self._records = Records(database)
        self._listeners: list[Stored] = []
        self._followers: list[OnWritten] = []
        self._waiters: dict[str, list[tuple[int, asyncio.Future[None]]]] = {}  # by node
        self._hurry = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._ends_moved = False
        self._nodes_moved = True
        self._ends_seen = clock()
        self._failing = False
        self._states: tuple[datetime, Mapping[Status, int]] = (datetime.min.replace(tzinfo=UTC), {})
        database.listen(self._committed)
        metrics.watch(self.count_states, self.book.counts)

    def on_stored(self, listener: Stored) -> None:
        """Call `listener(node_id, sequence)` when reports up to that one are in the database, to be acknowledged."""
        self._listeners.append(listener)

    def on_written(self, follower: OnWritten) -> None:
        """Call `follower(written)` after each commit of what was reported; it must not block."""
        self._followers.append(follower)

    async def wait_reported(self, node_id: str, timeout: float) -> bool:
        """Wait until a report that was made after this call is in the database."""
        mark = self._ledger.marks.get(node_id)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (mark.sequence if mark is not None else 0, stored)
        waiters = self._waiters.setdefault(node_id, [])
        waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                await stored
        except TimeoutError:
            return False
        finally:
            waiters.remove(waiter)
        return True

    async def load(self) -> None:
        """Read where the last process stopped."""
        async with self._database.connect() as connection:
            await self._records.load(connection, self.book, self._clock().timestamp())
            for row in await connection.execute(LIVE):
                self._ledger.add(entry_from_row(row))
            for row in await connection.execute(sa.select(ReportMarkRow.__table__)):
                self._ledger.marks[row.node_id] = Mark(row.boot_id, row.sequence, row.former_boot_ids.split())

    async def run(self) -> None:
        """Write what changed every few seconds, and at the end.

        A database that cannot be written then does not hold up the end: what is not acknowledged is reported again.
        """
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval):
                        await self._hurry.wait()
                        await asyncio.sleep(_HURRY)
                await self.flush()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_FLUSH):
                    await self.flush()

    def record(self, node_id: str, report: Report) -> None:
        """Count a report. A repeated or late one, and unknown peers, change nothing."""
        moment = self._clock()
        recorded = self._ledger.record(node_id, report, moment)
        self._account(node_id, recorded, moment)
        if recorded.new:
            self._settle(node_id, self.book.record(node_id, report, moment.timestamp()), moment)
            if report.usage or self.book.strange or self.book.calls:
                self._hurry.set()

    def begin(self, row: ConnectionRow) -> None:
        """A new connection is committed. What its peer counted before, for an earlier connection, is not its own."""
        entry = entry_from_row(row)
        former = self._ledger.of_peer(entry.peer)
        if former is not None:
            entry.counters = former.counters.baseline()
            entry.last_handshake = former.last_handshake
            self._ledger.changed[entry.id] = entry
        self._ledger.add(entry)

    def get(self, connection_id: str) -> Traffic | None:
        """What is newer than the row, or None where nothing is."""
        entry = self._ledger.entries.get(connection_id)
        if entry is None:
            return None
        return Traffic(entry.counters.rx, entry.counters.tx, entry.handshake_at, self._is_live(entry))

    def baseline(self, node_id: str, public_key: bytes) -> tuple[Counters, int] | None:
        """Where a new connection of this peer begins to count, and the handshake that is not its own."""
        entry = self._ledger.of_peer((node_id, public_key))
        return (entry.counters.baseline(), entry.last_handshake) if entry is not None else None

    def count_states(self) -> Mapping[Status, int]:
        """As they were at most two seconds ago: to count many connections at every question slows what runs beside."""
        now = self._clock()
        counted_at, states = self._states
        if not counted_at <= now < counted_at + _COUNT_KEPT:
            entries = list(self._ledger.entries.values())  # in one step: metrics are made in a thread
            states = Counter(status(None, entry.handshake_at, now, self._is_live(entry)) for entry in entries)
            self._states = now, states
        return states

    async def flush(self) -> None:
        """Write what changed since the last flush. What could not be written stays for the next one."""
        async with self._flushing:
            await self._flush()

    async def _flush(self) -> None:
        self._hurry.clear()
        self.book.end_silent(self._clock().timestamp())
        try:
            if self._nodes_moved:
                await self._forget_deleted_nodes()
            while self._ledger.unknown or self.book.strange or self.book.calls:
                await self._look_up()
                await self._look_up_sessions()
            # No await between the look-up and taking the batch: marks and counts have to be of the same moment.
            try:
                await self._write()
            except IntegrityError:
                await self._forget_deleted()
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
            self._hurry.set()
        if Topic.NODES in committed.topics:
            self._nodes_moved = True

    def _is_live(self, entry: Entry) -> bool | None:
        return None if entry.protocol == Protocol.WIREGUARD else bool(self.book.of_connection(entry.id))

    def _account(self, node_id: str, recorded: Recorded, moment: datetime) -> None:
        now, rx, tx = moment.timestamp(), 0, 0
        for moved in recorded.moved:
            rx, tx = rx + moved.rx, tx + moved.tx
            entry = moved.entry
            self.book.infer(
                entry.id,
                entry.user_id,
                node_id,
                rx=moved.rx,
                tx=moved.tx,
                heard=moved.heard,
                handshake=int(entry.handshake_at.timestamp()) if entry.handshake_at is not None else 0,
                remote=moved.remote,
                now=now,
            )
        self._metrics.count_traffic(node_id, Protocol.WIREGUARD, rx, tx)
        for entry in recorded.quarantined:
            self._metrics.count_quarantine()
            if not entry.quarantined:
                entry.quarantined = True
                log.warning("tunnels.counter_quarantined", connection_id=entry.id, node_id=node_id)

    def _settle(self, node_id: str, counted: Counted, moment: datetime) -> None:
        for protocol in counted.moved:
            self._metrics.count_traffic(node_id, protocol, counted.rx[protocol], counted.tx[protocol])
        for connection_id, rx, tx in counted.connections:
            self._ledger.serve(connection_id, rx, tx, moment)
        for entry in counted.quarantined:
            self._metrics.count_quarantine()
            if not entry.quarantined:
                entry.quarantined = True
                log.warning("tunnels.counter_quarantined", session_id=entry.id, node_id=node_id)
        if counted.refused:
            self._metrics.count_refused_sessions(node_id, counted.refused)
            log.warning("tunnels.sessions_refused", node_id=node_id, count=counted.refused)
        if counted.news:
            self._hurry.set()

    async def _look_up(self) -> None:
        """Peers that are not in memory: another process may have made their connections."""
        nodes: defaultdict[str, list[bytes]] = defaultdict(list)
        for node_id, public_key in islice(self._ledger.unknown, _CHUNK):
            nodes[node_id].append(public_key)
        async with self._database.connect() as connection:
            for node_id, keys in nodes.items():
                rows = await connection.execute(
                    LIVE.where(ConnectionRow.node_id == node_id, ConnectionRow.public_key.in_(keys))
                )
                moment = self._clock()
                self._account(node_id, self._ledger.adopt(node_id, keys, map(entry_from_row, rows), moment), moment)

    async def _look_up_sessions(self) -> None:
        """Sessions that are not in memory: new ones, ended ones, and all of a node whose link begins."""
        for node_id in sorted(self.book.strange.keys() | self.book.calls.keys()):
            call = self.book.calls.get(node_id)
            asked = list(islice(self.book.strange.get(node_id, {}), _MANY))
            async with self._database.connect() as connection:
                now = self._clock().timestamp()
                found = await self._records.find(connection, node_id, asked, all_open=call is not None, now=now)
                known = {entry.id for entry in found}
                new = [session_id for session_id in asked if session_id not in known]
                owned = await self._owners(connection, node_id, new)
            moment = self._clock()
            counted = self.book.adopt(node_id, asked, call, found, owned, moment.timestamp())
            self._settle(node_id, counted, moment)

    async def _owners(self, connection: AsyncConnection, node_id: str, session_ids: list[str]) -> dict[str, str]:
        """The user of each new session whose account has, or had, the login that it is said to have come in by."""
        strange = self.book.strange.get(node_id, {})
        samples = [strange[session_id] for session_id in session_ids if session_id in strange]
        users = await self._records.users(connection, {sample.account for sample in samples})
        logins = await owners(connection, {(sample.protocol, sample.username) for sample in samples})
        ended = {
            sample.connection
            for sample in samples
            if sample.connection and (sample.protocol, sample.username) not in logins
        }
        connections = await users_of(connection, node_id, ended)
        owned: dict[str, str] = {}
        for sample in samples:
            user_id = users.get(sample.account)
            login = logins.get((sample.protocol, sample.username))
            if login is not None:
                owner = login.user_id if login.node_id in (None, node_id) else None
            else:
                owner = connections.get(sample.connection)
            if user_id is not None and owner == user_id:
                owned[sample.id] = user_id
        return owned

    async def _forget_deleted(self) -> None:
        """Accounts were deleted while their sessions moved bytes: there is nobody to count them for."""
        self._records.forget()
        batch = self.book.take()
        self.book.put_back(batch)
        users = batch.users()
        async with self._database.connect() as connection:
            self.book.forget_users(users - await accounts.existing(connection, users))

    async def _forget_deleted_nodes(self) -> None:
        known = self._ledger.nodes() | self.book.nodes()
        self._nodes_moved = False
        try:
            async with self._database.connect() as connection:
                gone = known - await census.existing(connection, known)
        except StoreUnavailable:
            self._nodes_moved = True
            raise
        if gone:
            self._ledger.forget_nodes(gone)
            self.book.end_nodes(gone, int(self._clock().timestamp()), "node_deleted")

    async def _write(self) -> None:
        changed, self._ledger.changed = self._ledger.changed, {}
        reporting, self._ledger.reporting = self._ledger.reporting, set()
        batch = self.book.take()
        if not changed and not reporting and not batch:
            return
        changes = Changes(batch)
        rows = [row_of(entry) for _, entry in sorted(changed.items())]
        marks = [mark_of(node_id, self._ledger.marks[node_id]) for node_id in sorted(reporting)]
        try:
            async with self._database.certain_transaction() as tx:  # what is written twice counts twice
                connection = await tx.session.connection()
                if rows:
                    await connection.execute(UPDATE, rows)
                await NOTE_MARK.run(connection, marks)
                written = await self._records.write(connection, changes)
        except BaseException:
            self.book.put_back(batch)
            self._ledger.changed = changed | self._ledger.changed
            self._ledger.reporting |= reporting
            raise
        self.book.written(batch)
        for node_id, _, sequence, _ in marks:
            for listener in self._listeners:
                listener(node_id, sequence)
            for before, stored in self._waiters.get(node_id, ()):
                if sequence > before and not stored.done():
                    stored.set_result(None)
        for follower in self._followers:
            follower(written)

    async def _drop_ended(self) -> None:
        """Forget connections that were ended, here or by another process, after their last counts are written."""
        self._ends_moved = False
        now = self._clock()
        try:
            async with self._database.connect() as connection:
                ended = await connection.execute(
                    sa.select(ConnectionRow.id, ConnectionRow.ended_at, ConnectionRow.end_reason).where(
                        ConnectionRow.ended_at > self._ends_seen - _OVERLAP
                    )
                )
        except StoreUnavailable:
            self._ends_moved = True
            raise
        self._ends_seen = now
        for row in ended:
            if row.id not in self._ledger.changed:
                self._ledger.drop(row.id)
                if self.book.end_connection(row.id, int(row.ended_at.timestamp()), row.end_reason or ""):
                    self._hurry.set()
            else:
                self._ends_moved = True
                self._hurry.set()
