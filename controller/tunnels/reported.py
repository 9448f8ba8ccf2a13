"""Reads and writes the counters of connections, and how far each node's reports are counted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from controller.store.bulk import Bulk, batched
from controller.tunnels.counters import Counters
from controller.tunnels.ledger import Entry, Mark
from controller.tunnels.tables import ConnectionRow, ReportMarkRow

_COUNTS = ("generation", "last_rx", "last_tx", "last_handshake", "rx", "tx", "handshake_at")
LIVE = sa.select(
    ConnectionRow.id,
    ConnectionRow.user_id,
    ConnectionRow.node_id,
    ConnectionRow.protocol,
    ConnectionRow.public_key,
    ConnectionRow.created_at,
    *(getattr(ConnectionRow, name) for name in _COUNTS),
).where(ConnectionRow.ended_at.is_(None))
UPDATE = (
    sa.update(ConnectionRow.__table__)  # type: ignore[arg-type]
    .where(ConnectionRow.id == sa.bindparam("connection_id"))
    .values({name: sa.bindparam(f"new_{name}") for name in _COUNTS})
)


def _note_mark(insert: Any) -> Any:
    statement = insert(ReportMarkRow.__table__).values({name: sa.bindparam(name) for name in _MARK})
    return statement.on_conflict_do_update(
        index_elements=["node_id"], set_={name: statement.excluded[name] for name in _MARK[1:]}
    )


_MARK = ("node_id", "boot_id", "sequence", "former_boot_ids")
NOTE_MARK = Bulk(_note_mark, _MARK)


async def users_of(connection: AsyncConnection, node_id: str, ids: Collection[str]) -> dict[str, str]:
    """The user of each of the node's connections, also of ended ones."""
    found: dict[str, str] = {}
    for chunk in batched(sorted(ids)):
        rows = await connection.execute(
            sa.select(ConnectionRow.id, ConnectionRow.user_id).where(
                ConnectionRow.node_id == node_id, ConnectionRow.id.in_(chunk)
            )
        )
        found |= {row.id: row.user_id for row in rows}
    return found


def entry_from_row(row: Any) -> Entry:
    """From a row of `LIVE` or a whole ConnectionRow."""
    return Entry(
        id=row.id,
        user_id=row.user_id,
        protocol=row.protocol,
        peer=(row.node_id, row.public_key),
        counters=Counters(row.generation, row.last_rx, row.last_tx, row.rx, row.tx),
        last_handshake=row.last_handshake,
        handshake_at=row.handshake_at,
        counted_at=row.created_at,
    )


def row_of(entry: Entry) -> dict[str, object]:
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


def mark_of(node_id: str, mark: Mark) -> tuple[str, str, int, str]:
    return node_id, mark.boot_id, mark.sequence, " ".join(mark.former_boot_ids)
