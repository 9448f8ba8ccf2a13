"""Use cases of connections: create, look at, configure, end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import sqlalchemy as sa
import structlog

from controller.access import credentials
from controller.access.clientconfig import ClientConfig
from controller.access.configuring import client_config
from controller.access.logins import Logins
from controller.accounts.principal import Plan, Principal
from controller.desired import service as desired
from controller.errors import InvalidInput
from controller.fleet import standing
from controller.fleet.directory import Directory, Server, ServerStatus
from controller.fleet.errors import ServerNotFound
from controller.store.database import Database, StoreUnavailable
from controller.store.types import new_id, now
from controller.tunnels import ending, errors
from controller.tunnels.addresses import Pool
from controller.tunnels.clientconfig import WireGuardConfig
from controller.tunnels.connection import Connection
from controller.tunnels.live import LiveStates, Traffic
from controller.tunnels.opening import BLOCKED, HoldAccount, Opener, Wanted, WireGuardKeys, check_allowed
from controller.tunnels.peers import Peers, open_key
from controller.tunnels.status import Status, status
from controller.tunnels.tables import AllocationRow, ConnectionRow
from controller.usage import limits
from controller.usage.limits import AccountLimits
from shared import services
from shared.keys import InvalidKey, PresharedKey, PrivateKey, PublicKey, encode_key
from shared.resource import Protocol

_MAX_DEVICE_ID = 64
_SWEEP_INTERVAL = 3600.0  # seconds

log = structlog.get_logger()

WaitApplied = Callable[[str, str, int, float], Awaitable[bool]]
ServerOf = Callable[[str, Protocol], services.Server]


@dataclass(frozen=True, slots=True)
class TunnelSettings:
    pool: Pool
    dns: tuple[str, ...]
    cool_down: timedelta = timedelta(minutes=10)  # before an address serves somebody else
    unused_after: timedelta = timedelta(days=1)  # a connection that never had a handshake ends
    silent_after: timedelta = timedelta(days=30)  # one that has had none for so long, too
    kept: timedelta = timedelta(days=90)  # after its end
    ssh_tunnels: int = credentials.TUNNELS  # addresses that SSH has


class Tunnels:
    """`wait_applied(node_id, scope, revision, timeout)` waits until the node has acknowledged the revision.

    `server_of(node_id, protocol)` is what the node runs for a protocol beside WireGuard, `mtu_of(node_id)` its
    WireGuard interface's MTU.
    """

    def __init__(
        self,
        database: Database,
        directory: Directory,
        live: LiveStates,
        logins: Logins,
        settings: TunnelSettings,
        *,
        max_connections: Callable[[Plan], int],
        hold_account: HoldAccount,
        server_of: ServerOf,
        mtu_of: Callable[[str], int],
        wait_applied: WaitApplied,
    ) -> None:
        self._database = database
        self._directory = directory
        self._live = live
        self._logins = logins
        self._settings = settings
        self._max_connections = max_connections
        self._server_of = server_of
        self._mtu_of = mtu_of
        self._wait_applied = wait_applied
        self._opener = Opener(database, live, settings.pool, settings.cool_down, hold_account, settings.ssh_tunnels)
        self._peers = Peers(settings.pool)

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

        WireGuard: without a public key the controller makes the pair. A key that the same account already uses on this
        server replaces that connection: the peer keeps its addresses, the old connection ends as "replaced". Every
        other protocol: the connection gets a login of its own.
        """
        server = self._directory.server(principal.plan, server_id)
        if server.status is not ServerStatus.ONLINE:
            raise errors.ServerUnavailable(status=server.status)
        if protocol not in server.protocols:
            raise errors.ProtocolNotOffered(offered=", ".join(server.protocols))
        chosen = Protocol(protocol)
        check_allowed(principal.protocols, chosen)
        device_id = _device_id(device_id)
        if chosen is not Protocol.WIREGUARD and public_key is not None:
            raise InvalidInput({"public_key": f"is for {Protocol.WIREGUARD} only"})
        opened = await self._opener.open(
            Wanted(
                id=new_id(),
                user_id=principal.user_id,
                node_id=server.id,
                contract=contract,
                protocol=chosen,
                device_id=device_id,
                proof=_keys(public_key, server) if chosen is Protocol.WIREGUARD else await self._logins.make(chosen),
                limit=self._max_connections(principal.plan),
            )
        )
        row = opened.row
        self._live.begin(row)
        log.info(
            "tunnels.connection_created",
            connection_id=row.id,
            user_id=row.user_id,
            node_id=row.node_id,
            protocol=row.protocol,
        )
        applied = None
        if wait is not None:
            applied = await self._wait_applied(row.node_id, desired.node_scope(row.node_id), opened.revision, wait)
        return self._connection(row, opened.addresses, applied)

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
        return self._connection(row, self._peers.addresses(slot))

    async def list_live(self, principal: Principal) -> list[Connection]:
        """The account's connections that have not ended, oldest first; those not in have what keeps them out."""
        async with self._database.read() as session:
            refusal = self._refusal(principal.user_id, await limits.read(session, principal.user_id))
            rows = await session.execute(
                _WITH_SLOT.where(ConnectionRow.user_id == principal.user_id, ConnectionRow.ended_at.is_(None)).order_by(
                    ConnectionRow.created_at, ConnectionRow.id
                )
            )
            found = [self._connection(row, self._peers.addresses(slot)) for row, slot in rows]
            out = {one.server_id for one in found if one.status is not Status.CONNECTED}
            ailing = await standing.ailing(session, out) if refusal is None and out else set()
        return [self._explained(one, refusal, ailing) for one in found]

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
            login = await credentials.of_connection(session, self._database.secrets, connection_id)
        if found is None:
            raise errors.ConnectionNotFound
        row, slot = found
        server = self._directory.known(row.node_id)
        if row.protocol == Protocol.WIREGUARD:
            return self._wireguard_config(row, slot, server)
        if login is None:
            raise errors.ConnectionNotFound  # it has just ended
        return client_config(server, self._server_of(server.id, login.protocol), login)

    async def end_expired(self) -> int:
        """End what nobody uses: it holds an address, and a place of the plan's limit. Return how many there were."""
        moment = now()
        return await ending.end_expired(
            self._database, moment - self._settings.unused_after, moment - self._settings.silent_after, self._present
        )

    async def run(self) -> None:
        """End expired connections every hour, and forget those that ended long ago."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL)
            try:
                await self.end_expired()
                await ending.purge(self._database, now() - self._settings.kept)
            except StoreUnavailable:
                log.warning("tunnels.sweep_failed")

    def _refusal(self, user_id: str, allowed: AccountLimits) -> str | None:
        blocked = allowed.blocked(now())
        if blocked is not None:
            return str(errors.AccountBlocked(reason=BLOCKED[blocked]))
        live, most = len(self._live.book.of_user(user_id)), allowed.max_sessions
        if most is not None and live >= most:
            return str(errors.AccountBlocked(reason=f"{live} of {most} sessions are in use; end one of them"))
        return None

    def _explained(self, one: Connection, refusal: str | None, ailing: set[tuple[str, str]]) -> Connection:
        if one.status is Status.CONNECTED:
            return one
        if refusal is None and (one.server_id, one.protocol) in ailing:
            # Not in the node's words: they are its operator's, and may name what is on the host.
            refusal = f"{self._directory.name(one.server_id)} reports a problem with its {one.protocol} server"
        return replace(one, refusal=refusal)

    def _addresses(self, connection_id: str) -> tuple[str, ...]:
        """What the client has inside, by its sessions."""
        told = {entry.address for entry in self._live.book.of_connection(connection_id) if entry.address}
        return tuple(f"{address}/{128 if ':' in address else 32}" for address in sorted(told))

    def _wireguard_config(self, row: ConnectionRow, slot: int | None, server: Server) -> WireGuardConfig:
        private_key = open_key(self._database.secrets, row, "sealed_private_key")
        preshared_key = open_key(self._database.secrets, row, "sealed_preshared_key")
        return WireGuardConfig(
            name=f"SkynetVPN {server.name}",
            addresses=self._peers.addresses(slot),
            dns=self._settings.dns,
            endpoint_host=server.host,
            endpoint_port=server.wireguard_port,
            server_public_key=PublicKey(server.wireguard_public_key),
            client_public_key=PublicKey(row.public_key),
            private_key=PrivateKey(private_key) if private_key is not None else None,
            preshared_key=PresharedKey(preshared_key) if preshared_key is not None else None,
            mtu=self._mtu_of(server.id),
        )

    def _connection(self, row: ConnectionRow, addresses: tuple[str, ...], applied: bool | None = None) -> Connection:
        wireguard = row.protocol == Protocol.WIREGUARD
        newer = self._live.get(row.id) or Traffic(row.rx, row.tx, row.handshake_at, live=None if wireguard else False)
        return Connection(
            id=row.id,
            user_id=row.user_id,
            server_id=row.node_id,
            protocol=row.protocol,
            device_id=row.device_id,
            public_key=encode_key(row.public_key) if wireguard else None,
            addresses=addresses if wireguard else self._addresses(row.id),
            status=status(row.ended_at, newer.handshake_at, now(), newer.live),
            created_at=row.created_at,
            ended_at=row.ended_at,
            end_reason=row.end_reason,
            handshake_at=newer.handshake_at,
            rx=newer.rx,
            tx=newer.tx,
            applied=applied,
        )

    def _present(self, node_id: str) -> bool:
        try:
            return self._directory.known(node_id).status is not ServerStatus.OFFLINE
        except ServerNotFound:
            return False


_WITH_SLOT = sa.select(ConnectionRow, AllocationRow.slot).outerjoin(
    AllocationRow, AllocationRow.connection_id == ConnectionRow.id
)


def _keys(public_key: str | None, server: Server) -> WireGuardKeys:
    private_key = PrivateKey.generate() if public_key is None else None
    return WireGuardKeys(
        private_key.public() if private_key is not None else _client_key(public_key or "", server),
        private_key,
        PresharedKey.generate(),
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
