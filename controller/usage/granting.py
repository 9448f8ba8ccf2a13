"""Gives nodes leases of their accounts' quotas, and takes back what they do not use."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.accounts import rows as accounts
from controller.accounts.errors import UserNotFound
from controller.desired import service as desired
from controller.fleet import census
from controller.store.bulk import batched
from controller.store.database import Committed, Database, StoreUnavailable, Topic, Transaction
from controller.usage import leases
from controller.usage.leases import Held
from controller.usage.records import Written
from controller.usage.tables import LeaseRow, LimitsRow
from shared.access import Lease
from shared.desired import Kind

_ROUND = 60.0  # seconds between two looks at leases that nobody uses
_IDLE = 600.0  # seconds without use, after which a lease is taken back
_WAIT = 30.0  # seconds for a node to show that it goes by a smaller allowance
_RETRY = 1.0

log = structlog.get_logger()

WaitApplied = Callable[[str, str, int, float], Awaitable[bool]]


class Granting:
    """`wait_applied(node_id, scope, revision, timeout)`: the node goes by that revision.

    `wait_reported(node_id, timeout)`: a report that the node made after the call is stored. Only both together tell
    that a lowered allowance holds, and what was used of the higher one: until then nobody else gets the difference.
    """

    def __init__(
        self,
        database: Database,
        wait_applied: WaitApplied,
        wait_reported: Callable[[str, float], Awaitable[bool]],
        *,
        most: int = leases.MOST,
        idle_seconds: float = _IDLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._wait_applied = wait_applied
        self._wait_reported = wait_reported
        self._most = most
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._due: set[tuple[str, str]] = set()  # node id, user id
        self._used_at: dict[tuple[str, str], float] = {}
        self._confirming: set[str] = set()
        self._wake = asyncio.Event()
        database.listen(self._committed)

    def on_written(self, written: Written) -> None:
        if written.leases:
            self._due.update(written.leases)
            self._used_at |= dict.fromkeys(written.leases, self._clock())
            self._wake.set()

    async def run(self) -> None:
        failing, round_at = False, self._clock()
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                wait = _ROUND
                try:
                    await self.renew()
                    if self._clock() >= round_at:
                        await self.take_back()
                        round_at = self._clock() + _ROUND
                    for node_id in await self._lowered():
                        self._confirming.add(node_id)
                        tasks.create_task(self._confirm(node_id))
                    failing = False
                except StoreUnavailable:
                    if not failing:
                        log.warning("usage.granting_failed")
                    failing, wait = True, _RETRY
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._wake.wait()

    async def renew(self) -> None:
        """Give more to the nodes that have used half of what they had."""
        due, self._due = self._due, set()
        try:
            for chunk in batched(sorted(due)):
                users = {user_id for _, user_id in chunk}
                async with self._database.connect() as connection:
                    quotas, held = await _read(connection, sorted(users))
                for node_id, user_id in chunk:
                    lease = held[user_id].get(node_id)
                    if (
                        lease is None
                        or user_id not in quotas
                        or not leases.wants(quotas[user_id][0], lease, self._most)
                    ):
                        continue
                    try:
                        async with self._database.transaction() as tx:
                            await self._renew(tx, node_id, user_id)
                    except UserNotFound:
                        continue  # deleted meanwhile, and its leases too
        except BaseException:
            self._due |= due
            raise

    async def take_back(self) -> None:
        """Leave nodes that do not use their lease as little as if they never had one; help those that have nothing."""
        moment, after = self._clock(), ("", "")
        async with self._database.read() as session:
            nodes = await census.enrolled(session)
        while True:
            async with self._database.connect() as connection:
                rows = (await connection.execute(_ALL, {"node_id": after[0], "user_id": after[1]})).all()
            if not rows:
                return
            for row in rows:
                after = row.node_id, row.user_id
                lease = Held(row.allowance, row.used, row.reserved)
                if lease.left == 0 and row.used_bytes < row.quota_bytes:
                    async with self._database.transaction() as tx:
                        await self._help(tx, row.node_id, row.user_id, nodes)
                elif moment - self._used_at.setdefault(after, moment) >= self._idle_seconds:
                    allowance = leases.idle(row.quota_bytes, row.used_bytes, lease, nodes, self._most)
                    if allowance < lease.allowance:
                        await self._lower({after[0]: allowance}, after[1])

    async def _renew(self, tx: Transaction, node_id: str, user_id: str) -> None:
        limits = await tx.session.get(LimitsRow, user_id, with_for_update=True)
        rows = await _rows(tx, user_id)
        if limits is None or limits.quota_bytes is None or node_id not in rows:
            return
        quota, used = limits.quota_bytes, limits.used_bytes
        held = {name: _held(row) for name, row in rows.items()}
        allowance = leases.renewed(quota, used, held, node_id, self._most)
        if allowance > held[node_id].allowance:
            await _allow(tx, user_id, rows, {node_id: allowance})
        elif held[node_id].left == 0 and used < quota:
            # Others hold the rest: those that have not used theirs for a while give it up.
            recent = self._clock() - _ROUND
            wanted = {
                name: lease.used
                for name, lease in held.items()
                if name != node_id and lease.left and self._used_at.get((name, user_id), 0.0) < recent
            }
            await _allow(tx, user_id, rows, wanted)

    async def _help(self, tx: Transaction, node_id: str, user_id: str, nodes: int) -> None:
        limits = await tx.session.get(LimitsRow, user_id, with_for_update=True)
        rows = await _rows(tx, user_id)
        if limits is not None and limits.quota_bytes is not None and node_id in rows:
            held = {name: _held(row) for name, row in rows.items()}
            allowance = leases.helped(limits.quota_bytes, limits.used_bytes, held, node_id, nodes, self._most)
            await _allow(tx, user_id, rows, {node_id: allowance})

    async def _lower(self, wanted: Mapping[str, int], user_id: str) -> None:
        async with self._database.transaction() as tx:
            await tx.session.get(LimitsRow, user_id, with_for_update=True)
            rows = await _rows(tx, user_id)
            current = {name: allowance for name, allowance in wanted.items() if name in rows}
            await _allow(tx, user_id, rows, current)

    def _committed(self, committed: Committed) -> None:
        if Topic.LIMITS in committed.topics:
            self._wake.set()  # leases may have been lowered

    async def _lowered(self) -> Sequence[str]:
        """Nodes that may still go by more than they were told last."""
        async with self._database.connect() as connection:
            nodes = await connection.scalars(
                sa.select(LeaseRow.node_id).where(LeaseRow.reserved > LeaseRow.allowance).distinct()
            )
            return sorted(set(nodes) - self._confirming)

    async def _confirm(self, node_id: str) -> None:
        try:
            async with self._database.connect() as connection:
                rows = (await connection.execute(_LOWERED, {"of_node": node_id})).all()
                scope = desired.node_scope(node_id)
                revision = (await desired.revisions(connection, [scope]))[scope]
            if not await self._wait_applied(node_id, scope, revision, _WAIT):
                return
            if not await self._wait_reported(node_id, _WAIT):
                return
            async with self._database.transaction() as tx:
                for row in rows:
                    await tx.session.execute(
                        sa.update(LeaseRow)
                        .where(
                            LeaseRow.node_id == node_id,
                            LeaseRow.user_id == row.user_id,
                            LeaseRow.allowance == row.allowance,
                        )
                        .values(reserved=LeaseRow.allowance)
                    )
            await self._offer([row.user_id for row in rows])
        except StoreUnavailable:
            log.warning("usage.lease_not_confirmed", node_id=node_id)
        finally:
            self._confirming.discard(node_id)

    async def _offer(self, user_ids: Sequence[str]) -> None:
        """Something came free: nodes that wait for it are looked at again."""
        for chunk in batched(user_ids):
            query = sa.select(LeaseRow.node_id, LeaseRow.user_id).where(
                LeaseRow.user_id.in_(chunk), LeaseRow.allowance <= LeaseRow.used
            )
            async with self._database.connect() as connection:
                self._due.update((row.node_id, row.user_id) for row in await connection.execute(query))
        self._wake.set()


_ALL = (
    sa.select(
        LeaseRow.node_id,
        LeaseRow.user_id,
        LeaseRow.allowance,
        LeaseRow.reserved,
        LeaseRow.used,
        LimitsRow.quota_bytes,
        LimitsRow.used_bytes,
    )
    .join(LimitsRow, LimitsRow.user_id == LeaseRow.user_id)
    .where(
        LimitsRow.quota_bytes.is_not(None),
        sa.tuple_(LeaseRow.node_id, LeaseRow.user_id) > sa.tuple_(sa.bindparam("node_id"), sa.bindparam("user_id")),
    )
    .order_by(LeaseRow.node_id, LeaseRow.user_id)
    .limit(1000)
)
_LOWERED = sa.select(LeaseRow.user_id, LeaseRow.allowance).where(
    LeaseRow.node_id == sa.bindparam("of_node"), LeaseRow.reserved > LeaseRow.allowance
)


async def forget_node(tx: Transaction, node_id: str) -> None:
    """Give back what a node that is deleted was allowed."""
    await tx.session.execute(sa.delete(LeaseRow).where(LeaseRow.node_id == node_id))


async def rebalance(tx: Transaction, user_id: str, most: int = leases.MOST) -> None:
    """The quota changed or began anew. One that is gone leaves no leases."""
    rows = await _rows(tx, user_id)
    if not rows:
        return
    limits = await tx.session.get(LimitsRow, user_id)
    if limits is None or limits.quota_bytes is None:
        number = (await accounts.row(tx.session, user_id)).number
        for node_id, row in sorted(rows.items()):
            await desired.remove(tx, desired.node_scope(node_id), Kind.LEASE, [str(number)])
            await tx.session.delete(row)
        await tx.session.flush()
        return
    held = {node_id: _held(row) for node_id, row in rows.items()}
    nodes = await census.enrolled(tx.session)
    await _allow(tx, user_id, rows, leases.shared(limits.quota_bytes, limits.used_bytes, held, nodes, most))


async def _allow(tx: Transaction, user_id: str, rows: Mapping[str, LeaseRow], wanted: Mapping[str, int]) -> None:
    number = (await accounts.row(tx.session, user_id)).number
    for node_id, allowance in sorted(wanted.items()):
        row = rows[node_id]
        if allowance == row.allowance:
            continue
        row.allowance, row.reserved = allowance, max(row.reserved, allowance)
        lease = Lease(account=number, allowance=allowance, ledger=row.ledger)
        await desired.put(tx, desired.node_scope(node_id), [lease])
    await tx.session.flush()


def _held(row: LeaseRow) -> Held:
    return Held(row.allowance, row.used, row.reserved)


async def _rows(tx: Transaction, user_id: str) -> dict[str, LeaseRow]:
    """The account's leases by node, as they are now: reports write them past the session."""
    rows = await tx.session.scalars(
        sa.select(LeaseRow)
        .where(LeaseRow.user_id == user_id)
        .order_by(LeaseRow.node_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return {row.node_id: row for row in rows}


async def _read(
    connection: AsyncConnection, user_ids: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, Held]]]:
    """Each account's (quota, used), and its leases by node."""
    quotas = {
        row.user_id: (row.quota_bytes, row.used_bytes)
        for row in await connection.execute(
            sa.select(LimitsRow.user_id, LimitsRow.quota_bytes, LimitsRow.used_bytes).where(
                LimitsRow.user_id.in_(user_ids), LimitsRow.quota_bytes.is_not(None)
            )
        )
    }
    held: defaultdict[str, dict[str, Held]] = defaultdict(dict)
    for row in await connection.execute(sa.select(LeaseRow).where(LeaseRow.user_id.in_(user_ids))):
        held[row.user_id][row.node_id] = Held(row.allowance, row.used, row.reserved)
    return quotas, held
