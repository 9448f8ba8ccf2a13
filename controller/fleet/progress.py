"""How far each node has come with each scope: written in batches, since a lost acknowledgement only costs a resend."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql, sqlite

from controller.desired import service as desired
from controller.fleet.nodes import printable
from controller.fleet.offer import known_protocols, scopes_of
from controller.fleet.tables import AppliedRow, NodeRow
from controller.store.database import Database
from controller.store.types import now
from shared.resource import Protocol

_ABSENT = timedelta(days=7)  # a node away for longer holds up no purge; it gets a snapshot when it returns
_MAX_PROBLEM = 2000
_BATCH = 500

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a node's scope from its earlier sessions."""

    refused_revision: int | None
    confirmed: bool


class Progress:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._pending: dict[tuple[str, str], dict[str, Any]] = {}
        self._flushing = asyncio.Lock()

    def applied(
        self,
        node_id: str,
        scope: str,
        revision: int,
        digest: bytes,
        problem: str | None,
        servers: Mapping[Protocol, str] = MappingProxyType({}),
    ) -> None:
        """`servers` says what ails which protocol, in the node's words."""
        words = {protocol: printable(message)[:_MAX_PROBLEM] for protocol, message in servers.items()}
        self._pending[node_id, scope] = {
            "revision": revision,
            "digest": digest,
            "applied_at": now(),
            "problem": printable(problem)[:_MAX_PROBLEM] if problem else None,
            "refused_revision": None,
            "confirmed_at": None,
            "servers": json.dumps(words),
        }

    async def refused(self, node_id: str, scope: str, revision: int, problem: str) -> None:
        """Stored at once: an operator may confirm it from another process."""
        await self.flush()  # also one that is under way: what came before must not be written over this
        refusal = {
            "problem": printable(problem)[:_MAX_PROBLEM],
            "refused_revision": revision,
            "confirmed_at": None,
        }
        first = {"revision": 0, "digest": b"", "applied_at": now()}
        await self._upsert([{"node_id": node_id, "scope": scope, **first, **refusal}], list(refusal))

    async def flush(self) -> None:
        """Write what came since the last call; it is kept where the database fails."""
        async with self._flushing:
            if not self._pending:
                return
            batch, self._pending = self._pending, {}
            rows = [{"node_id": node, "scope": scope, **values} for (node, scope), values in sorted(batch.items())]
            try:
                await self._upsert(rows, [name for name in rows[0] if name not in ("node_id", "scope")])
            except BaseException:
                self._pending = batch | self._pending
                raise

    async def standing(self, node_id: str) -> dict[str, Standing]:
        async with self._database.read() as session:
            rows = await session.scalars(sa.select(AppliedRow).where(AppliedRow.node_id == node_id))
            return {row.scope: Standing(row.refused_revision, row.confirmed_at is not None) for row in rows}

    async def confirmed(self, node_ids: Collection[str]) -> list[tuple[str, str, int]]:
        """The (node, scope, revision) of every refused snapshot that an operator has allowed since."""
        found: list[tuple[str, str, int]] = []
        async with self._database.connect() as connection:
            for part in _parts(sorted(node_ids)):
                rows = await connection.execute(
                    sa.select(AppliedRow.node_id, AppliedRow.scope, AppliedRow.refused_revision).where(
                        AppliedRow.node_id.in_(part),
                        AppliedRow.refused_revision.is_not(None),
                        AppliedRow.confirmed_at.is_not(None),
                    )
                )
                found += [(row.node_id, row.scope, row.refused_revision) for row in rows]
        return found

    async def seen(self, node_ids: Collection[str], moment: datetime) -> None:
        async with self._database.transaction() as tx:
            for part in _parts(sorted(node_ids)):
                await tx.session.execute(sa.update(NodeRow).where(NodeRow.id.in_(part)).values(last_seen_at=moment))

    async def purge(self) -> int:
        """Drop the tombstones that every node of their scope has applied; return how many."""
        async with self._database.read() as session:
            scopes = await desired.scopes_with_tombstones(session)
            nodes = await session.execute(
                sa.select(NodeRow.id, NodeRow.protocols).where(NodeRow.last_seen_at > now() - _ABSENT)
            )
            members: dict[str, set[str]] = {}
            for node in nodes:
                for scope in scopes.intersection(scopes_of(node.id, known_protocols(node.protocols.split()))):
                    members.setdefault(scope, set()).add(node.id)
            floors: dict[str, int] = {}
            for scope, wanted in members.items():
                rows = await session.execute(
                    sa.select(AppliedRow.node_id, AppliedRow.revision).where(AppliedRow.scope == scope)
                )
                reached = {row.node_id: row.revision for row in rows if row.node_id in wanted}
                if len(reached) == len(wanted):
                    floors[scope] = min(reached.values())
            # A protocol that no node offers: whoever offers it later begins with a snapshot.
            vacant = [scope for scope in scopes - members.keys() if not scope.startswith(desired.node_scope(""))]
            floors |= await desired.revisions(await session.connection(), vacant)
        purged = 0
        for scope, floor in sorted(floors.items()):
            async with self._database.transaction() as tx:
                purged += await desired.purge(tx, scope, floor)
        return purged

    async def _upsert(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        insert = postgresql.insert if self._database.engine.dialect.name == "postgresql" else sqlite.insert
        statement: Any = insert(AppliedRow)
        statement = statement.on_conflict_do_update(
            index_elements=["node_id", "scope"], set_={name: statement.excluded[name] for name in columns}
        )
        async with self._database.transaction() as tx:
            connection = await tx.session.connection()
            await connection.execute(statement, rows)


def _parts(items: list[str]) -> list[list[str]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
