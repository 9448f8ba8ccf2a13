"""Writes desired resources beside the rows that want them, and reads what a node has to be sent.

Payloads carry preshared keys: they rest sealed, each for its own row. One that does not open raises SecretUnreadable.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controller.desired.tables import DesiredRow, ScopeRow
from controller.secretbox import SecretBox
from controller.store.database import Transaction
from shared import desired
from shared.desired import Kind, Payload
from shared.protocol import Resource, ResourceName


@dataclass(frozen=True, slots=True)
class Changes:
    """What turns `base` into `revision`; `removals` come first when they are applied."""

    scope: str
    base: int
    revision: int
    digest: bytes
    upserts: list[Resource]
    removals: list[ResourceName]


@dataclass(frozen=True, slots=True)
class State:
    """A scope's whole state."""

    scope: str
    revision: int
    digest: bytes
    resources: list[Resource]


def node_scope(node_id: str) -> str:
    """The scope that is one node's own: its interfaces and peers."""
    return f"node:{node_id}"


def protocol_scope(protocol: str) -> str:
    """The scope of every node that offers the protocol: the accounts' own credentials."""
    return f"protocol:{protocol}"


async def put(tx: Transaction, scope: str, payloads: Sequence[Payload]) -> int:
    """Make the scope run these resources too; return the new revision. Unchanged resources cost nothing."""
    for payload in payloads:
        payload.check()
    existing = await _rows(tx.session, scope, [(desired.kind_of(payload), payload.key) for payload in payloads])
    changed: list[tuple[Payload, bytes]] = []
    total = 0
    for payload in payloads:
        encoded = desired.encode(payload)
        row = existing.get((desired.kind_of(payload), payload.key))
        if row is not None and not row.deleted:
            former = _opened(tx.secrets, scope, row.kind, row.key, row.payload)
            if former.payload == encoded:
                continue
            total -= _digest(former)
        total += payload.digest()
        changed.append((payload, encoded))
    if not changed:
        return await _revision(tx.session, scope)
    upserts = [Resource(desired.kind_of(payload), payload.key, encoded) for payload, encoded in changed]
    revision = await _advance(tx, scope, total, upserts, [])
    for payload, encoded in changed:
        kind = desired.kind_of(payload)
        row = existing.get((kind, payload.key))
        if row is None:
            row = DesiredRow(scope=scope, kind=kind, key=payload.key)
            tx.session.add(row)
        sealed = tx.secrets.seal(encoded, **_place(scope, kind, payload.key))
        row.revision, row.payload, row.deleted = revision, sealed, False
    await tx.session.flush()
    return revision


async def remove(tx: Transaction, scope: str, kind: Kind, keys: Sequence[str]) -> int:
    """Take resources off the scope, leaving tombstones; return the new revision. One that is not there is no error."""
    rows = [row for row in (await _rows(tx.session, scope, [(kind, key) for key in keys])).values() if not row.deleted]
    if not rows:
        return await _revision(tx.session, scope)
    total = sum(_digest(_opened(tx.secrets, scope, row.kind, row.key, row.payload)) for row in rows)
    revision = await _advance(tx, scope, -total, [], [ResourceName(row.kind, row.key) for row in rows])
    for row in rows:
        row.revision, row.payload, row.deleted = revision, b"", True
    await tx.session.flush()
    return revision


async def revisions(connection: AsyncConnection, scopes: Sequence[str]) -> dict[str, int]:
    """The current revision of each scope; 0 for one that never had a resource."""
    found = await connection.execute(sa.select(ScopeRow.scope, ScopeRow.revision).where(ScopeRow.scope.in_(scopes)))
    return dict.fromkeys(scopes, 0) | {row.scope: row.revision for row in found}


async def changes(connection: AsyncConnection, secrets: SecretBox, scope: str, base: int) -> Changes | None:
    """What changed after `base`; None where that is unknown (tombstones purged, or a base from another history)."""
    rows = (await connection.execute(_SINCE, {"scope": scope, "base": base})).all()
    if not rows:
        return Changes(scope, 0, 0, desired.EMPTY_DIGEST, [], []) if base == 0 else None
    head = rows[0]
    if base > head.revision or base < head.floor:
        return None
    return Changes(
        scope,
        base,
        head.revision,
        head.digest,
        [_opened(secrets, scope, row.kind, row.key, row.payload) for row in rows if row.deleted is False],
        [ResourceName(row.kind, row.key) for row in rows if row.deleted],
    )


async def state(connection: AsyncConnection, secrets: SecretBox, scope: str) -> State:
    """The whole scope."""
    rows = (await connection.execute(_SINCE, {"scope": scope, "base": 0})).all()
    if not rows:
        return State(scope, 0, desired.EMPTY_DIGEST, [])
    resources = [_opened(secrets, scope, row.kind, row.key, row.payload) for row in rows if row.deleted is False]
    return State(scope, rows[0].revision, rows[0].digest, resources)


async def names(connection: AsyncConnection, kind: Kind) -> list[tuple[str, str]]:
    """The scope and the key of each resource of this kind."""
    present = sa.select(DesiredRow.scope, DesiredRow.key).where(DesiredRow.kind == kind, sa.not_(DesiredRow.deleted))
    return [(row.scope, row.key) for row in await connection.execute(present)]


async def newest(
    session: AsyncSession, kinds: Collection[Kind], scope: str | None = None
) -> dict[tuple[str, Kind], int]:
    """By scope and kind, the revision that changed a resource last; of one scope or of all."""
    present = sa.select(DesiredRow.scope, DesiredRow.kind, sa.func.max(DesiredRow.revision).label("revision")).where(
        DesiredRow.kind.in_(kinds), sa.not_(DesiredRow.deleted)
    )
    if scope is not None:
        present = present.where(DesiredRow.scope == scope)
    rows = await session.execute(present.group_by(DesiredRow.scope, DesiredRow.kind))
    return {(row.scope, Kind(row.kind)): row.revision for row in rows}


async def scopes_with_tombstones(session: AsyncSession) -> set[str]:
    return set(await session.scalars(sa.select(DesiredRow.scope).where(DesiredRow.deleted).distinct()))


async def purge(tx: Transaction, scope: str, applied: int) -> int:
    """Drop the tombstones that every node of the scope has applied; return how many there were."""
    purged = await tx.session.execute(
        sa.delete(DesiredRow).where(DesiredRow.scope == scope, DesiredRow.deleted, DesiredRow.revision <= applied)
    )
    count: int = purged.rowcount  # type: ignore[attr-defined]
    if count:
        await tx.session.execute(
            sa.update(ScopeRow).where(ScopeRow.scope == scope, ScopeRow.floor < applied).values(floor=applied)
        )
    return count


async def forget(tx: Transaction, scope: str) -> None:
    """Delete the scope: nobody runs it any more."""
    await tx.session.flush()
    for table in (DesiredRow, ScopeRow):
        await tx.session.execute(sa.delete(table).where(table.scope == scope))


# The scope's head and its changes in one statement, so that they belong together on every engine; a scope without
# changes is one row whose `deleted` is NULL.
_SINCE = (
    sa.select(
        ScopeRow.revision,
        ScopeRow.floor,
        ScopeRow.digest,
        DesiredRow.kind,
        DesiredRow.key,
        DesiredRow.payload,
        DesiredRow.deleted,
    )
    .outerjoin(DesiredRow, (DesiredRow.scope == ScopeRow.scope) & (DesiredRow.revision > sa.bindparam("base")))
    .where(ScopeRow.scope == sa.bindparam("scope"))
    .order_by(DesiredRow.revision)
)


def _place(scope: str, kind: str, key: str) -> dict[str, str]:
    """The one row that a sealed payload opens in."""
    return {"table": DesiredRow.__tablename__, "column": "payload", "row": f"{scope}/{kind}/{key}"}


def _opened(secrets: SecretBox, scope: str, kind: str, key: str, sealed: bytes) -> Resource:
    return Resource(kind, key, secrets.open(sealed, **_place(scope, kind, key)))


def _digest(resource: Resource) -> int:
    return desired.decode(resource.kind, resource.key, resource.payload).digest()


async def _rows(
    session: AsyncSession, scope: str, names: Sequence[tuple[Kind, str]]
) -> dict[tuple[str, str], DesiredRow]:
    found: dict[tuple[str, str], DesiredRow] = {}
    for start in range(0, len(names), 500):  # engines limit the parameters of a statement
        part = names[start : start + 500]
        kinds, keys = {kind for kind, _ in part}, [key for _, key in part]
        # With the kinds it is a search in the primary key; without, a walk through the whole scope.
        query = sa.select(DesiredRow).where(
            DesiredRow.scope == scope, DesiredRow.kind.in_(kinds), DesiredRow.key.in_(keys)
        )
        rows = await session.scalars(query)
        found.update({(row.kind, row.key): row for row in rows})
    return {name: found[name] for name in names if name in found}


async def _advance(
    tx: Transaction, scope: str, digest_change: int, upserts: list[Resource], removals: list[ResourceName]
) -> int:
    """Count one change of the scope and move its digest; the row lock orders concurrent changes."""
    row = await tx.session.get(ScopeRow, scope, with_for_update=True)
    if row is None:
        row = ScopeRow(scope=scope, revision=0, floor=0, digest=desired.EMPTY_DIGEST)
        tx.session.add(row)
    row.revision += 1
    row.digest = desired.digest_bytes(int.from_bytes(row.digest) + digest_change)
    await tx.session.flush()
    tx.poke(scope)
    tx.note(Changes(scope, row.revision - 1, row.revision, row.digest, upserts, removals))
    return row.revision


async def _revision(session: AsyncSession, scope: str) -> int:
    return await session.scalar(sa.select(ScopeRow.revision).where(ScopeRow.scope == scope)) or 0
