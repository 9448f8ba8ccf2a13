"""Ends connections: keys and logins forgotten, addresses cooling down, peers off their nodes, in one transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from datetime import datetime

import sqlalchemy as sa
import structlog

from controller.access import credentials
from controller.desired import service as desired
from controller.store.database import Database, Topic, Transaction
from controller.store.types import now
from controller.tunnels import allocation
from controller.tunnels.tables import AllocationRow, ConnectionRow, ReportMarkRow
from shared.desired import Kind
from shared.keys import encode_key
from shared.resource import Protocol

_BATCH = 500

log = structlog.get_logger()


def close(row: ConnectionRow, reason: str, moment: datetime) -> None:
    row.ended_at, row.end_reason = moment, reason
    row.sealed_private_key = row.sealed_preshared_key = None


async def end(tx: Transaction, rows: Sequence[ConnectionRow], reason: str) -> dict[str, int]:
    """End live connections; return the revision of each node's scope that takes its peers and logins off."""
    if not rows:
        return {}
    moment = now()
    peers: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        close(row, reason, moment)
        if row.protocol == Protocol.WIREGUARD:
            peers[row.node_id].append(encode_key(row.public_key))
    await tx.session.flush()
    await allocation.release(tx.session, [row.id for row in rows], moment)
    revisions = {
        node_id: await desired.remove(tx, desired.node_scope(node_id), Kind.WIREGUARD_PEER, keys)
        for node_id, keys in sorted(peers.items())  # one order for all writers: no deadlock on the scopes' rows
    }
    logins = [row.id for row in rows if row.protocol != Protocol.WIREGUARD]
    for scope, revision in (await credentials.end_connections(tx, logins)).items():
        revisions[scope.removeprefix(desired.node_scope(""))] = revision
    tx.touch(Topic.CONNECTIONS)
    log.info("tunnels.connections_ended", connection_ids=[row.id for row in rows], reason=reason)
    return revisions


async def end_account(tx: Transaction, user_id: str, reason: str) -> int:
    return await _end_where(tx, ConnectionRow.user_id == user_id, reason)


async def forget_node(tx: Transaction, node_id: str) -> int:
    """End the connections to a node that is deleted, and delete them with those that have ended; how many lived."""
    ended = await _end_where(tx, ConnectionRow.node_id == node_id, "node_deleted")
    for table in (AllocationRow, ConnectionRow, ReportMarkRow):
        await tx.session.execute(sa.delete(table).where(table.node_id == node_id))
    return ended


async def end_expired(
    database: Database, unused_since: datetime, silent_since: datetime, present: Callable[[str], bool]
) -> int:
    """End connections that never had a handshake, or none for long; in batches, so that others can write between.

    Nodes that are not `present` are left alone: their clients may be connected without our knowing.
    """
    expired = sa.or_(
        sa.and_(ConnectionRow.handshake_at.is_(None), ConnectionRow.created_at < unused_since),
        ConnectionRow.handshake_at < silent_since,
    )
    after, ended = "", 0
    while True:
        async with database.transaction() as tx:
            rows = (
                await tx.session.scalars(
                    sa.select(ConnectionRow)
                    .where(ConnectionRow.ended_at.is_(None), expired, ConnectionRow.id > after)
                    .order_by(ConnectionRow.id)
                    .limit(_BATCH)
                    .with_for_update(skip_locked=True)
                )
            ).all()
            if not rows:
                return ended
            after = rows[-1].id
            gone = [row for row in rows if present(row.node_id)]
            await end(tx, gone, "expired")
            ended += len(gone)


async def purge(database: Database, before: datetime) -> int:
    """Forget connections that ended before; in batches, too. Return how many there were."""
    over = sa.select(ConnectionRow.id).where(ConnectionRow.ended_at < before).limit(_BATCH)
    purged = 0
    while True:
        async with database.transaction() as tx:
            done = await tx.session.execute(sa.delete(ConnectionRow).where(ConnectionRow.id.in_(over)))
        count: int = done.rowcount  # type: ignore[attr-defined]
        purged += count
        if count < _BATCH:
            return purged


async def end_by_ids(tx: Transaction, connection_ids: Collection[str], reason: str) -> int:
    """End those of the connections that live; how many there were."""
    return await _end_where(tx, ConnectionRow.id.in_(connection_ids), reason)


async def _end_where(tx: Transaction, condition: sa.ColumnElement[bool], reason: str) -> int:
    rows = await tx.session.scalars(
        sa.select(ConnectionRow)
        .where(condition, ConnectionRow.ended_at.is_(None))
        .order_by(ConnectionRow.id)
        .with_for_update()
    )
    ended = rows.all()
    await end(tx, ended, reason)
    return len(ended)
