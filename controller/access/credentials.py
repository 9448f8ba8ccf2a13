"""Credentials in the database, and beside them in the desired state of the nodes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from controller.access.logins import Login
from controller.access.standing import Standing
from controller.access.tables import CredentialRow
from controller.desired import service as desired
from controller.secretbox import SecretBox
from controller.store.database import Transaction
from controller.store.types import new_id, now
from shared.access import Credential
from shared.desired import Kind
from shared.resource import Protocol

TUNNELS = 65_533  # numbers of SSH logins that a /16 has addresses for
_TRIES = 32


async def of_account(session: AsyncSession, user_id: str) -> list[CredentialRow]:
    """All of it: the account's own, and those of its connections."""
    rows = await session.scalars(
        sa.select(CredentialRow).where(CredentialRow.user_id == user_id).order_by(CredentialRow.id).with_for_update()
    )
    return list(rows)


async def of_connection(session: AsyncSession, secrets: SecretBox, connection_id: str) -> Login | None:
    """What the connection's client needs; None once the connection has ended."""
    row = await session.scalar(sa.select(CredentialRow).where(CredentialRow.connection_id == connection_id))
    if row is None:
        return None
    return Login(
        protocol=Protocol(row.protocol),
        username=row.username,
        secret="",
        fingerprint=row.fingerprint,
        certificate=row.certificate.decode() if row.certificate is not None else "",
        password=_open(secrets, row, "sealed_password"),
        private_key=_open(secrets, row, "sealed_private_key"),
        tls_crypt=_open(secrets, row, "sealed_tls_crypt"),
        tunnel=row.tunnel or 0,
    )


def new(tx: Transaction, user_id: str, login: Login, connection: tuple[str, str] | None = None) -> CredentialRow:
    """A row for the login, of the account or of one `connection` (its id, and its node's)."""
    row = CredentialRow(
        id=new_id(),
        user_id=user_id,
        protocol=login.protocol,
        username=login.username,
        public_keys="",
        fingerprint=login.fingerprint,
        certificate=login.certificate.encode() or None,
        created_at=now(),
    )
    if connection is not None:
        row.connection_id, row.node_id = connection
    set_secret(tx, row, login.secret)
    row.sealed_password = _seal(tx.secrets, row, "sealed_password", login.password)
    row.sealed_private_key = _seal(tx.secrets, row, "sealed_private_key", login.private_key)
    row.sealed_tls_crypt = _seal(tx.secrets, row, "sealed_tls_crypt", login.tls_crypt)
    tx.session.add(row)
    return row


def set_secret(tx: Transaction, row: CredentialRow, secret: str) -> None:
    row.sealed_secret = tx.secrets.seal(secret.encode(), **_place(row, "sealed_secret"))


def secret_of(tx: Transaction, row: CredentialRow) -> str:
    return tx.secrets.open(row.sealed_secret, **_place(row, "sealed_secret")).decode()


async def put(
    tx: Transaction, rows: Iterable[CredentialRow], standing: Standing, tunnels: int = TUNNELS
) -> dict[str, int]:
    """Let the nodes have them; return the revision of each scope. SSH logins have numbers up to `tunnels`, while there
    are enough."""
    rows = list(rows)
    for row in rows:
        if row.protocol == Protocol.SSH and row.tunnel is None:
            row.tunnel = await _free_tunnel(tx.session, tunnels)
    await tx.session.flush()
    return {
        scope: await desired.put(tx, scope, [_payload(tx, row, standing) for row in found])
        for scope, found in _by_scope(rows)
    }


async def bring(tx: Transaction, rows: Sequence[CredentialRow], standing: Standing, tunnels: int = TUNNELS) -> None:
    """Let the nodes have those that the account may use now, and no others."""
    await put(tx, [row for row in rows if standing.admits(row.protocol)], standing, tunnels)
    await withdraw(tx, [row for row in rows if not standing.admits(row.protocol)])


async def withdraw(tx: Transaction, rows: Iterable[CredentialRow]) -> dict[str, int]:
    """Take them off the nodes; the rows stay. Return the revision of each scope."""
    return {
        scope: await desired.remove(tx, scope, Kind.CREDENTIAL, [f"{row.protocol}/{row.username}" for row in found])
        for scope, found in _by_scope(rows)
    }


async def delete(tx: Transaction, rows: Sequence[CredentialRow]) -> dict[str, int]:
    """Take them off the nodes, and forget them; return the revision of each scope."""
    revisions = await withdraw(tx, rows)
    await tx.session.execute(sa.delete(CredentialRow).where(CredentialRow.id.in_([row.id for row in rows])))
    return revisions


async def end_connections(tx: Transaction, connection_ids: Sequence[str]) -> dict[str, int]:
    """Forget the credentials of connections that end; return the revision of each scope."""
    rows = await tx.session.scalars(
        sa.select(CredentialRow).where(CredentialRow.connection_id.in_(connection_ids)).with_for_update()
    )
    return await delete(tx, rows.all())


async def _free_tunnel(session: AsyncSession, most: int) -> int:
    """A number that no login has. Any: replies to the flows of a login that has just gone still come to the address of
    its number, which the next login shall hardly get. Where most are taken, the smallest."""
    tries = random.sample(range(1, most + 1), min(most, _TRIES))
    taken = set(await session.scalars(sa.select(CredentialRow.tunnel).where(CredentialRow.tunnel.in_([1, *tries]))))
    free = [number for number in tries if number not in taken]
    if free or 1 not in taken:
        return free[0] if free else 1
    following = aliased(CredentialRow)
    smallest = sa.select(sa.func.min(CredentialRow.tunnel) + 1).where(
        ~sa.exists().where(following.tunnel == CredentialRow.tunnel + 1)
    )
    return await session.scalar(smallest) or 1


def _payload(tx: Transaction, row: CredentialRow, standing: Standing) -> Credential:
    return Credential(
        protocol=Protocol(row.protocol),
        username=row.username,
        account=standing.number,
        connection=row.connection_id or "",
        secret=secret_of(tx, row),
        public_keys=tuple(row.public_keys.splitlines()),
        fingerprint=row.fingerprint,
        tunnel=row.tunnel or 0,
        not_after=standing.not_after,
        limits=standing.limits,
    )


def _by_scope(rows: Iterable[CredentialRow]) -> list[tuple[str, list[CredentialRow]]]:
    """In one order for all writers: no deadlock on the scopes' rows."""
    scopes: defaultdict[str, list[CredentialRow]] = defaultdict(list)
    for row in rows:
        own = desired.protocol_scope(row.protocol) if row.node_id is None else desired.node_scope(row.node_id)
        scopes[own].append(row)
    return sorted(scopes.items())


def _place(row: CredentialRow, column: str) -> dict[str, str]:
    return {"table": CredentialRow.__tablename__, "column": column, "row": row.id}


def _seal(secrets: SecretBox, row: CredentialRow, column: str, value: str) -> bytes | None:
    return secrets.seal(value.encode(), **_place(row, column)) if value else None


def _open(secrets: SecretBox, row: CredentialRow, column: str) -> str:
    sealed: bytes | None = getattr(row, column)
    return secrets.open(sealed, **_place(row, column)).decode() if sealed is not None else ""
