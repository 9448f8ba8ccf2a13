"""Writes a new connection: its row, and the peer or the credential that its node gets, in one transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from controller.access import credentials
from controller.access.logins import Login
from controller.access.standing import Standing, standing_of
from controller.accounts.rows import User
from controller.desired import service as desired
from controller.store.database import Database, StoreUnavailable, Topic, Transaction
from controller.store.types import now
from controller.tunnels import allocation, ending, errors
from controller.tunnels.addresses import Pool
from controller.tunnels.counters import Counters
from controller.tunnels.live import LiveStates
from controller.tunnels.peers import Peers, seal_key
from controller.tunnels.tables import ConnectionRow
from shared.keys import PresharedKey, PrivateKey, PublicKey
from shared.resource import Protocol

_ATTEMPTS = 32  # of a transaction whose slot or key another one took first
BLOCKED = {"inactive": "it is not active", "expired": "it has expired", "quota": "its traffic quota is used up"}

HoldAccount = Callable[[Transaction, str], Awaitable[User]]


@dataclass(frozen=True, slots=True)
class WireGuardKeys:
    public_key: PublicKey
    private_key: PrivateKey | None  # None = the client made it
    preshared_key: PresharedKey


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one connection is to be, the same in every attempt to write it."""

    id: str
    user_id: str
    node_id: str
    contract: str
    protocol: Protocol
    device_id: str | None
    proof: WireGuardKeys | Login  # by which the node knows its client
    limit: int  # of the account's live connections


@dataclass(frozen=True, slots=True)
class Opened:
    row: ConnectionRow
    addresses: tuple[str, ...]
    revision: int  # of the node's own scope


class Opener:
    """`hold_account(tx, user_id)` locks the account until the commit, and raises where it may not connect any more.
    `tunnels` is how many addresses SSH has."""

    def __init__(
        self,
        database: Database,
        live: LiveStates,
        pool: Pool,
        cool_down: timedelta,
        hold_account: HoldAccount,
        tunnels: int,
    ) -> None:
        self._database = database
        self._live = live
        self._pool = pool
        self._cool_down = cool_down
        self._hold_account = hold_account
        self._tunnels = tunnels
        self._peers = Peers(pool)

    async def open(self, wanted: Wanted) -> Opened:
        for _ in range(_ATTEMPTS):
            try:
                async with self._database.transaction() as tx:
                    return await self._open(tx, wanted)
            except IntegrityError:
                continue  # another writer took the slot or the key between our reading and our writing
        raise StoreUnavailable

    async def _open(self, tx: Transaction, wanted: Wanted) -> Opened:
        account = await self._hold_account(tx, wanted.user_id)
        check_allowed(account.protocols, wanted.protocol)
        standing = await standing_of(tx.session, account)
        if standing.blocked is not None:
            raise errors.AccountBlocked(reason=BLOCKED[standing.blocked])
        tx.touch(Topic.CONNECTIONS)
        if isinstance(wanted.proof, Login):
            return await self._with_login(tx, wanted, wanted.proof, standing)
        return await self._with_keys(tx, wanted, wanted.proof, standing)

    async def _with_login(self, tx: Transaction, wanted: Wanted, login: Login, standing: Standing) -> Opened:
        await _check_limit(tx.session, wanted)
        row = _row(wanted, name_digest(login))
        tx.session.add(row)
        await tx.session.flush()
        credential = credentials.new(tx, row.user_id, login, (row.id, row.node_id))
        revisions = await credentials.put(tx, [credential], standing, self._tunnels)
        return Opened(row, (), revisions[desired.node_scope(row.node_id)])

    async def _with_keys(self, tx: Transaction, wanted: Wanted, keys: WireGuardKeys, standing: Standing) -> Opened:
        """A key that the account already uses on the node replaces that connection, which passes its addresses on."""
        session = tx.session
        row = _row(wanted, keys.public_key.raw)
        if keys.private_key is not None:
            row.sealed_private_key = seal_key(tx.secrets, row, "sealed_private_key", keys.private_key.raw)
        row.sealed_preshared_key = seal_key(tx.secrets, row, "sealed_preshared_key", keys.preshared_key.raw)
        former = await _latest(session, row.node_id, row.public_key)
        replaced = former if former is not None and former.ended_at is None else None
        if replaced is not None and replaced.user_id != row.user_id:
            raise errors.PublicKeyInUse
        await _check_limit(session, wanted, replaced is not None)
        if former is not None:
            self._continue_counting(row, former)
        if replaced is not None:
            ending.close(replaced, "replaced", row.created_at)
            await session.flush()
        session.add(row)
        await session.flush()
        if replaced is not None:
            slot = await allocation.pass_on(session, replaced.id, row.id)
        else:
            slot = await allocation.allocate(session, self._pool, row.node_id, row.id, row.created_at, self._cool_down)
        return Opened(row, self._peers.addresses(slot), await self._peers.put(tx, row, slot, standing))

    def _continue_counting(self, row: ConnectionRow, former: ConnectionRow) -> None:
        """The node may still have the peer of an earlier connection: what it has counted is not this one's."""
        counters, last_handshake = self._live.baseline(row.node_id, row.public_key) or (
            Counters(former.generation, former.last_rx, former.last_tx, 0, 0),
            former.last_handshake,
        )
        row.generation, row.last_rx, row.last_tx = counters.generation, counters.last_rx, counters.last_tx
        row.last_handshake = last_handshake


def check_allowed(protocols: tuple[str, ...] | None, protocol: Protocol) -> None:
    if protocols is not None and protocol not in protocols:
        raise errors.ProtocolNotAllowed(allowed=", ".join(protocols) or "none")


def name_digest(login: Login) -> bytes:
    """In place of a public key, which this connection has not: as long as one, and as unique."""
    return hashlib.sha256(f"{login.protocol}/{login.username}".encode()).digest()


def _row(wanted: Wanted, public_key: bytes) -> ConnectionRow:
    return ConnectionRow(
        id=wanted.id,
        user_id=wanted.user_id,
        node_id=wanted.node_id,
        contract=wanted.contract,
        protocol=wanted.protocol,
        device_id=wanted.device_id,
        created_at=now(),
        public_key=public_key,
        last_rx=0,
        last_tx=0,
        last_handshake=0,
        rx=0,
        tx=0,
    )


async def _check_limit(session: AsyncSession, wanted: Wanted, replaces: bool = False) -> None:
    live = await session.scalar(
        sa.select(sa.func.count())
        .select_from(ConnectionRow)
        .where(ConnectionRow.user_id == wanted.user_id, ConnectionRow.ended_at.is_(None))
    )
    if (live or 0) - replaces >= wanted.limit:
        raise errors.ConnectionLimitReached(limit=wanted.limit)


async def _latest(session: AsyncSession, node_id: str, public_key: bytes) -> ConnectionRow | None:
    """The newest connection of the peer on the node: the live one if there is one."""
    row: ConnectionRow | None = await session.scalar(
        sa.select(ConnectionRow)
        .where(ConnectionRow.node_id == node_id, ConnectionRow.public_key == public_key)
        .order_by(ConnectionRow.ended_at.is_(None).desc(), ConnectionRow.created_at.desc())
        .limit(1)
        .with_for_update()
    )
    return row
