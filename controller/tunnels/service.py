"""Use cases of connections: create, look at, configure, end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from controller.accounts.principal import Plan, Principal
from controller.desired import service as desired
from controller.errors import InvalidInput
from controller.fleet.directory import Directory, Server, ServerStatus
from controller.fleet.errors import ServerNotFound
from controller.store.database import Database, StoreUnavailable, Topic, Transaction
from controller.store.types import new_id, now
from controller.tunnels import allocation, ending, errors
from controller.tunnels.addresses import Pool
from controller.tunnels.clientconfig import ClientConfig
from controller.tunnels.connection import Connection
from controller.tunnels.counters import Counters
from controller.tunnels.live import LiveStates
from controller.tunnels.status import status
from controller.tunnels.tables import AllocationRow, ConnectionRow
from shared.desired import Peer
from shared.keys import InvalidKey, PresharedKey, PrivateKey, PublicKey, encode_key

_ATTEMPTS = 32  # of a transaction whose slot or key another one took first
_MAX_DEVICE_ID = 64
_SWEEP_INTERVAL = 3600.0  # seconds

log = structlog.get_logger()

HoldAccount = Callable[[Transaction, str], Awaitable[None]]
WaitApplied = Callable[[str, str, int, float], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class TunnelSettings:
    pool: Pool
    dns: tuple[str, ...]
    mtu: int = 1420
    cool_down: timedelta = timedelta(minutes=10)  # before an address serves somebody else
    unused_after: timedelta = timedelta(days=1)  # a connection that never had a handshake ends
    silent_after: timedelta = timedelta(days=30)  # one that has had none for so long, too


@dataclass(frozen=True, slots=True)
class _Request:
    """What one connection is to be, the same in every attempt to write it."""

    id: str
    user_id: str
    node_id: str
    contract: str
    protocol: str
    device_id: str | None
    public_key: PublicKey
    private_key: PrivateKey | None
    preshared_key: PresharedKey
    limit: int


class Tunnels:
    """`hold_account(tx, user_id)` locks the account until the commit, and raises where it may not connect any more.

    `wait_applied(node_id, scope, revision, timeout)` waits until the node has acknowledged the revision.
    """

    def __init__(
        self,
        database: Database,
        directory: Directory,
        live: LiveStates,
        settings: TunnelSettings,
        *,
        max_connections: Callable[[Plan], int],
        hold_account: HoldAccount,
        wait_applied: WaitApplied,
    ) -> None:
        self._database = database
        self._directory = directory
        self._live = live
        self._settings = settings
        self._max_connections = max_connections
        self._hold_account = hold_account
        self._wait_applied = wait_applied

    async def create(
        self,
        principal: Principal,
        contract: str,
        server_id: str,
        protocol: str,
        public_key: str | None = None,
        device_id: str | None = None,
        wait: float | None = None,
    ) -> Connection:
        """Connect the account to the server; with `wait`, give the node so many seconds to acknowledge it.

        Without a public key the controller makes the pair. A key that the same account already uses on this server
        replaces that connection: the peer keeps its addresses, the old connection ends as "replaced".
        """
        server = self._directory.server(principal.plan, server_id)
        if server.status is not ServerStatus.ONLINE:
            raise errors.ServerUnavailable(status=server.status)
        if protocol not in server.protocols:
            raise errors.ProtocolNotOffered(offered=", ".join(server.protocols))
        private_key = PrivateKey.generate() if public_key is None else None
        request = _Request(
            id=new_id(),
            user_id=principal.user_id,
            node_id=server.id,
            contract=contract,
            protocol=protocol,
            device_id=_device_id(device_id),
            public_key=private_key.public() if private_key is not None else _client_key(public_key or "", server),
            private_key=private_key,
            preshared_key=PresharedKey.generate(),
            limit=self._max_connections(principal.plan),
        )
        row, addresses, revision = await self._insert(request)
        self._live.begin(row)
        log.info("tunnels.connection_created", connection_id=row.id, user_id=row.user_id, node_id=row.node_id)
        applied = None
        if wait is not None:
            applied = await self._wait_applied(row.node_id, desired.node_scope(row.node_id), revision, wait)
        return self._connection(row, addresses, applied)

    async def get(self, principal: Principal, connection_id: str) -> Connection:
        """One of the account's connections, also after its end; raise ConnectionNotFound."""
        async with self._database.read() as session:
            found = (
                await session.execute(
                    _WITH_SLOT.where(ConnectionRow.id == connection_id, ConnectionRow.user_id == principal.user_id)
                )
            ).one_or_none()
        if found is None:
            raise errors.ConnectionNotFound
        row, slot = found
        return self._connection(row, self._addresses(slot))

    async def list_live(self, principal: Principal) -> list[Connection]:
        """The account's connections that have not ended, oldest first."""
        async with self._database.read() as session:
            rows = await session.execute(
                _WITH_SLOT.where(ConnectionRow.user_id == principal.user_id, ConnectionRow.ended_at.is_(None)).order_by(
                    ConnectionRow.created_at, ConnectionRow.id
                )
            )
            return [self._connection(row, self._addresses(slot)) for row, slot in rows]

    async def terminate(self, principal: Principal, connection_id: str, wait: float | None = None) -> Connection:
        """End a connection for ever; raise ConnectionNotFound, also where it has ended before."""
        async with self._database.transaction() as tx:
            row = await tx.session.scalar(
                sa.select(ConnectionRow)
                .where(
                    ConnectionRow.id == connection_id,
                    ConnectionRow.user_id == principal.user_id,
                    ConnectionRow.ended_at.is_(None),
                )
                .with_for_update()
            )
            if row is None:
                raise errors.ConnectionNotFound
            revisions = await ending.end(tx, [row], "terminated")
        applied = None
        if wait is not None:
            scope = desired.node_scope(row.node_id)
            applied = await self._wait_applied(row.node_id, scope, revisions[row.node_id], wait)
        return self._connection(row, (), applied)

    async def client_config(self, principal: Principal, connection_id: str) -> ClientConfig:
        """What the client needs to connect; raise ConnectionNotFound once the connection has ended."""
        async with self._database.read() as session:
            found = (
                await session.execute(
                    _WITH_SLOT.where(
                        ConnectionRow.id == connection_id,
                        ConnectionRow.user_id == principal.user_id,
                        ConnectionRow.ended_at.is_(None),
                    )
                )
            ).one_or_none()
        if found is None:
            raise errors.ConnectionNotFound
        row, slot = found
        server = self._directory.known(row.node_id)
        private_key = self._open(row, "sealed_private_key", row.sealed_private_key)
        preshared_key = self._open(row, "sealed_preshared_key", row.sealed_preshared_key)
        return ClientConfig(
            name=f"SkynetVPN {server.name}",
            addresses=self._addresses(slot),
            dns=self._settings.dns,
            endpoint_host=server.host,
            endpoint_port=server.wireguard_port,
            server_public_key=PublicKey(server.wireguard_public_key),
            client_public_key=PublicKey(row.public_key),
            private_key=PrivateKey(private_key) if private_key is not None else None,
            preshared_key=PresharedKey(preshared_key) if preshared_key is not None else None,
            mtu=self._settings.mtu,
        )

    async def end_expired(self) -> int:
        """End what nobody uses: it holds an address, and a place of the plan's limit. Return how many there were."""
        moment = now()
        return await ending.end_expired(
            self._database, moment - self._settings.unused_after, moment - self._settings.silent_after, self._present
        )

    async def run(self) -> None:
        """End expired connections every hour."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL)
            try:
                await self.end_expired()
            except StoreUnavailable:
                log.warning("tunnels.sweep_failed")

    async def _insert(self, request: _Request) -> tuple[ConnectionRow, tuple[str, ...], int]:
        for _ in range(_ATTEMPTS):
            try:
                async with self._database.transaction() as tx:
                    return await self._connect(tx, request)
            except IntegrityError:
                continue  # another writer took the slot or the key between our reading and our writing
        raise StoreUnavailable

    async def _connect(self, tx: Transaction, request: _Request) -> tuple[ConnectionRow, tuple[str, ...], int]:
        session = tx.session
        await self._hold_account(tx, request.user_id)
        row = self._row(request)
        former = await _latest(session, row.node_id, row.public_key)
        replaced = former if former is not None and former.ended_at is None else None
        if replaced is not None and replaced.user_id != row.user_id:
            raise errors.PublicKeyInUse
        if await _count_live(session, row.user_id) - (replaced is not None) >= request.limit:
            raise errors.ConnectionLimitReached(limit=request.limit)
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
            slot = await allocation.allocate(
                session, self._settings.pool, row.node_id, row.id, row.created_at, self._settings.cool_down
            )
        addresses = self._settings.pool.client_addresses(slot)
        peer = Peer(public_key=row.public_key, allowed_ips=addresses, preshared_key=request.preshared_key.raw)
        revision = await desired.put(tx, desired.node_scope(row.node_id), [peer])
        tx.touch(Topic.CONNECTIONS)
        return row, addresses, revision

    def _row(self, request: _Request) -> ConnectionRow:
        row = ConnectionRow(
            id=request.id,
            user_id=request.user_id,
            node_id=request.node_id,
            contract=request.contract,
            protocol=request.protocol,
            device_id=request.device_id,
            created_at=now(),
            public_key=request.public_key.raw,
            last_rx=0,
            last_tx=0,
            last_handshake=0,
            rx=0,
            tx=0,
        )
        if request.private_key is not None:
            row.sealed_private_key = self._seal(row, "sealed_private_key", request.private_key.raw)
        row.sealed_preshared_key = self._seal(row, "sealed_preshared_key", request.preshared_key.raw)
        return row

    def _continue_counting(self, row: ConnectionRow, former: ConnectionRow) -> None:
        """The node may still have the peer of an earlier connection: what it has counted is not this one's."""
        counters, last_handshake = self._live.baseline(row.node_id, row.public_key) or (
            Counters(former.generation, former.last_rx, former.last_tx, 0, 0),
            former.last_handshake,
        )
        row.generation, row.last_rx, row.last_tx = counters.generation, counters.last_rx, counters.last_tx
        row.last_handshake = last_handshake

    def _connection(self, row: ConnectionRow, addresses: tuple[str, ...], applied: bool | None = None) -> Connection:
        newer = self._live.get(row.id)
        rx, tx, handshake_at = newer if newer is not None else (row.rx, row.tx, row.handshake_at)
        return Connection(
            id=row.id,
            user_id=row.user_id,
            server_id=row.node_id,
            protocol=row.protocol,
            device_id=row.device_id,
            public_key=encode_key(row.public_key),
            addresses=addresses,
            status=status(row.ended_at, handshake_at, now()),
            created_at=row.created_at,
            ended_at=row.ended_at,
            end_reason=row.end_reason,
            handshake_at=handshake_at,
            rx=rx,
            tx=tx,
            applied=applied,
        )

    def _addresses(self, slot: int | None) -> tuple[str, ...]:
        return self._settings.pool.client_addresses(slot) if slot is not None else ()

    def _present(self, node_id: str) -> bool:
        try:
            return self._directory.known(node_id).status is not ServerStatus.OFFLINE
        except ServerNotFound:
            return False

    def _seal(self, row: ConnectionRow, column: str, value: bytes) -> bytes:
        return self._database.secrets.seal(value, table=row.__tablename__, column=column, row=row.id)

    def _open(self, row: ConnectionRow, column: str, sealed: bytes | None) -> bytes | None:
        if sealed is None:
            return None
        return self._database.secrets.open(sealed, table=row.__tablename__, column=column, row=row.id)


_WITH_SLOT = sa.select(ConnectionRow, AllocationRow.slot).outerjoin(
    AllocationRow, AllocationRow.connection_id == ConnectionRow.id
)


def _client_key(text: str, server: Server) -> PublicKey:
    try:
        key = PublicKey.parse(text)
    except InvalidKey as error:
        raise InvalidInput({"public_key": str(error)}) from error
    if key.raw == server.wireguard_public_key:
        raise InvalidInput({"public_key": "this is the server's own key; send the client's"})
    return key


def _device_id(text: str | None) -> str | None:
    if text is not None and not (1 <= len(text) <= _MAX_DEVICE_ID and text.isprintable()):
        raise InvalidInput({"device_id": f"use 1 to {_MAX_DEVICE_ID} printable characters"})
    return text


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


async def _count_live(session: AsyncSession, user_id: str) -> int:
    return (
        await session.scalar(
            sa.select(sa.func.count())
            .select_from(ConnectionRow)
            .where(ConnectionRow.user_id == user_id, ConnectionRow.ended_at.is_(None))
        )
        or 0
    )
