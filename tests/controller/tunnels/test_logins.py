"""Connections by OpenVPN, SSH and L2TP: a login of their own on one node, from their creation to their end."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from controller.access.tables import CredentialRow
from controller.accounts.principal import Plan
from controller.accounts.tables import UserRow
from controller.desired.service import node_scope
from controller.errors import ErrorKind, InvalidInput
from controller.fleet.progress import Progress
from controller.store.types import now
from controller.tunnels import errors
from controller.tunnels.ending import end_account
from controller.tunnels.status import Status
from controller.tunnels.tables import AllocationRow, ConnectionRow
from controller.usage.tables import LimitsRow
from shared import crypt
from shared.access import Limits
from shared.resource import Protocol
from tests.controller.tunnels.conftest import HOST_KEY

LOGINS = ["openvpn", "ssh", "l2tp"]
NAME = re.compile(r"sky-[a-z2-7]{12}")


async def connect(world: Any, protocol: str, who: Any = None, **more: Any) -> Any:
    return await world.tunnels().create(who or world.alice, "skynet", world.nodes[-1], protocol, **more)


async def limit(world: Any, **columns: Any) -> None:
    async with world.database.transaction() as tx:
        row = LimitsRow(
            user_id=world.alice.user_id, **({"quota_period": "none", "used_bytes": 0, "told": ""} | columns)
        )
        tx.session.add(row)


async def allow(world: Any, protocols: str | None) -> None:
    async with world.database.transaction() as tx:
        await tx.session.execute(
            sa.update(UserRow).where(UserRow.id == world.alice.user_id).values(protocols=protocols)
        )


@pytest.mark.parametrize("protocol", LOGINS)
async def test_a_connection_gets_a_login_of_its_own_on_its_node_alone(world: Any, protocol: str) -> None:
    made = await connect(world, protocol, device_id="phone", wait=3.0)
    assert (made.status, made.protocol, made.public_key, made.addresses) == (Status.CONNECTING, protocol, None, ())
    assert made.applied is True and made.device_id == "phone"
    [login] = await world.credentials()
    assert (login.protocol, login.connection, login.account) == (protocol, made.id, world.alice.number)
    assert NAME.fullmatch(login.username)
    assert login.limits == Limits() and login.not_after is None
    assert await world.credentials(0) == []
    assert await world.tunnels().list_live(world.alice) == [replace(made, applied=None)]
    async with world.database.read() as session:
        row = await session.get_one(ConnectionRow, made.id)
        assert row.public_key == hashlib.sha256(f"{protocol}/{login.username}".encode()).digest()
        assert await session.scalar(sa.select(sa.func.count()).select_from(AllocationRow)) == 0


async def test_a_connection_that_is_not_in_says_what_keeps_it_out(world: Any) -> None:
    tunnels = world.tunnels()
    first, second = await connect(world, "ssh"), await connect(world, "openvpn")

    async def refusals() -> list[str | None]:
        return [one.refusal for one in await tunnels.list_live(world.alice)]

    assert await refusals() == [None, None]
    await limit(world, max_sessions=1)
    [login] = [login for login in await world.credentials() if login.connection == first.id]
    world.session(login)
    await world.live.flush()
    shown = await tunnels.list_live(world.alice)
    assert [(one.id, one.addresses) for one in shown] == [(first.id, ("10.67.0.2/32",)), (second.id, ())]
    assert [one.refusal for one in shown] == [
        None,
        "the account may not connect now: 1 of 1 sessions are in use; end one of them",
    ]
    world.session(login, ended=True)
    await world.live.flush()
    assert await refusals() == [None, None]
    for column, words in (
        ({"expires_at": now() - timedelta(seconds=1)}, "it has expired"),
        ({"expires_at": None, "quota_bytes": 10, "used_bytes": 10}, "its traffic quota is used up"),
    ):
        async with world.database.transaction() as tx:
            await tx.session.execute(sa.update(LimitsRow).values(**column))
        assert await refusals() == [f"the account may not connect now: {words}"] * 2


async def test_a_connection_that_is_not_in_says_that_its_nodes_server_ails(world: Any) -> None:
    tunnels, progress, node = world.tunnels(), Progress(world.database), world.nodes[-1]
    for protocol in ("ssh", "openvpn"):
        await connect(world, protocol)

    async def refusals(node_id: str, scope: str, ailing: dict[Protocol, str]) -> list[str | None]:
        progress.applied(node_id, scope, 1, b"", None, ailing)
        await progress.flush()
        return [one.refusal for one in await tunnels.list_live(world.alice)]

    ssh = {Protocol.SSH: "sshd cannot have TCP port 2222 of this host"}
    assert await refusals(world.nodes[0], node_scope(world.nodes[0]), ssh) == [None, None], "another node's"
    name = world.directory.name(node)
    assert await refusals(node, node_scope(node), ssh) == [f"{name} reports a problem with its ssh server", None]
    login = next(login for login in await world.credentials() if login.protocol == "ssh")
    world.session(login)
    await world.live.flush()
    assert [one.refusal for one in await tunnels.list_live(world.alice)] == [None, None], "it is in all the same"
    world.session(login, ended=True)
    await world.live.flush()
    assert await refusals(node, node_scope(node), {}) == [None, None]
    await limit(world, expires_at=now() - timedelta(seconds=1))
    assert await refusals(node, node_scope(node), ssh) == ["the account may not connect now: it has expired"] * 2


async def test_an_openvpn_login_is_a_certificate_of_the_fleets_authority(world: Any) -> None:
    made = await connect(world, "openvpn")
    [login] = await world.credentials()
    config = await world.tunnels().client_config(world.alice, made.id)
    certificate = x509.load_pem_x509_certificate(config.certificate.encode())
    assert certificate.fingerprint(hashes.SHA256()) == login.fingerprint
    assert login.secret == ""
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(config.ca.encode()))
    assert [name.value for name in certificate.subject] == [login.username] == [config.username]
    assert certificate.not_valid_after_utc > now() + timedelta(days=3000)
    assert (config.server_name, config.host, config.port) == (world.nodes[-1], "vpn.example.com", 1194)
    assert (await world.tunnels().client_config(world.alice, made.id)) == config


async def test_an_ssh_login_is_a_random_password(world: Any) -> None:
    made = await connect(world, "ssh")
    [login] = await world.credentials()
    config = await world.tunnels().client_config(world.alice, made.id)
    assert crypt.verify_password(config.password, login.secret)
    assert re.fullmatch(r"[A-Za-z0-9]{24}", config.password)
    assert (config.host_keys, config.port, config.username) == ((HOST_KEY,), 2222, login.username)


async def test_an_l2tp_login_is_a_random_password_and_the_nodes_key(world: Any) -> None:
    made = await connect(world, "l2tp")
    [login] = await world.credentials()
    config = await world.tunnels().client_config(world.alice, made.id)
    assert config.password == login.secret
    assert config.psk == world.protocols.server_of(world.nodes[-1], "l2tp").psk
    assert re.fullmatch(r"[A-Za-z0-9]{24}", config.password)


@pytest.mark.parametrize("protocol", LOGINS)
async def test_the_end_takes_the_login_off_for_ever(world: Any, protocol: str, tmp_path: Path) -> None:
    tunnels = world.tunnels()
    made = await connect(world, protocol)
    kept = await connect(world, protocol)
    config = await tunnels.client_config(world.alice, made.id)
    ended = await tunnels.terminate(world.alice, made.id, wait=4.0)
    assert (ended.status, ended.end_reason, ended.applied) == (Status.DISCONNECTED, "terminated", True)
    assert world.waits == [(world.nodes[-1], f"node:{world.nodes[-1]}", 3, 4.0)]
    assert [login.connection for login in await world.credentials()] == [kept.id]
    async with world.database.read() as session:
        assert (await session.scalars(sa.select(CredentialRow.connection_id))).all() == [kept.id]
    for refused in (tunnels.terminate, tunnels.client_config):
        with pytest.raises(errors.ConnectionNotFound):
            await refused(world.alice, made.id)
    assert (await tunnels.get(world.alice, made.id)).status is Status.DISCONNECTED
    secret = config.private_key if protocol == "openvpn" else config.password
    assert held(tmp_path, secret.encode()) == []  # sealed all the time


async def test_connections_of_all_protocols_end_together(world: Any) -> None:
    tunnels = world.tunnels()
    for protocol in ("wireguard", *LOGINS):
        await connect(world, protocol)
    await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    other = await connect(world, "ssh", world.bob)
    async with world.database.transaction() as tx:
        assert await end_account(tx, world.alice.user_id, "deactivated") == 5
    assert [(login.connection, login.account) for login in await world.wanted(-1)] == [(other.id, world.bob.number)]
    assert await world.wanted(0) == []
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.delete(UserRow).where(UserRow.id == world.alice.user_id))


async def test_the_plans_limit_counts_connections_of_every_protocol(world: Any) -> None:
    world.limits[Plan.PRO] = 2
    await connect(world, "ssh")
    await connect(world, "wireguard")
    for protocol in ("wireguard", *LOGINS):
        with pytest.raises(errors.ConnectionLimitReached):
            await connect(world, protocol)
    assert len(await world.wanted(-1)) == 2


async def test_a_key_is_of_no_use_to_other_protocols(world: Any) -> None:
    with pytest.raises(InvalidInput, match="public_key: "):
        await connect(world, "ssh", public_key=world.key())


async def test_a_server_that_does_not_offer_the_protocol_refuses(world: Any) -> None:
    for protocol in (*LOGINS, "pptp"):
        with pytest.raises(errors.ProtocolNotOffered):
            await world.tunnels().create(world.alice, "skynet", world.nodes[0], protocol)


async def test_an_account_uses_its_own_protocols_only(world: Any) -> None:
    await allow(world, "ssh l2tp")
    with pytest.raises(errors.ProtocolNotAllowed, match="it may use ssh, l2tp") as caught:
        await connect(world, "openvpn")
    assert caught.value.kind is ErrorKind.FORBIDDEN
    with pytest.raises(errors.ProtocolNotAllowed):
        await connect(world, "wireguard")
    await connect(world, "ssh")
    with pytest.raises(errors.ProtocolNotAllowed):  # as its token says
        await connect(world, "ssh", replace(world.alice, protocols=("l2tp",)))
    assert len(await world.credentials()) == 1
    await allow(world, "")
    with pytest.raises(errors.ProtocolNotAllowed, match="none"):
        await connect(world, "ssh")


@pytest.mark.parametrize("protocol", ["wireguard", *LOGINS])
@pytest.mark.parametrize(("why", "columns"), [("has expired", {}), ("used up", {"quota_bytes": 10, "used_bytes": 10})])
async def test_a_blocked_account_cannot_connect(world: Any, protocol: str, why: str, columns: dict[str, int]) -> None:
    await limit(world, **(columns or {"expires_at": now()}))
    with pytest.raises(errors.AccountBlocked, match=why) as caught:
        await connect(world, protocol)
    assert caught.value.kind is ErrorKind.FORBIDDEN
    assert await world.wanted(-1) == []


async def test_limits_ride_along_with_peers_and_logins(world: Any) -> None:
    ends = now().replace(microsecond=0) + timedelta(hours=1)
    await limit(world, expires_at=ends, max_sessions=2, rate_up=8_000_000, rate_down=9_000_000)
    for protocol in ("wireguard", *LOGINS):
        await connect(world, protocol)
    wanted = await world.wanted(-1)
    assert len(wanted) == 4
    for found in wanted:
        assert found.limits == Limits(max_sessions=2, rate_up=8_000_000, rate_down=9_000_000)
        assert (found.account, found.not_after) == (world.alice.number, int(ends.timestamp()))


@pytest.mark.parametrize("protocol", LOGINS)
async def test_a_connection_is_connected_while_its_login_has_a_session(world: Any, protocol: str) -> None:
    tunnels = world.tunnels()
    made = await connect(world, protocol)
    [login] = await world.credentials()
    world.session(login, rx=1840, tx=92410)
    await world.live.flush()
    found = await tunnels.get(world.alice, made.id)
    assert (found.status, found.rx, found.tx) == (Status.CONNECTED, 1840, 92410)
    assert found.handshake_at is not None
    world.session(login, rx=2000, tx=99999, ended=True)
    await world.live.flush()
    found = await tunnels.get(world.alice, made.id)
    assert (found.status, found.rx, found.tx) == (Status.DISCONNECTED, 2000, 99999)


async def test_logins_that_nobody_uses_expire(world: Any) -> None:
    tunnels = world.tunnels(unused_after=timedelta(0), silent_after=timedelta(days=30))
    used = await connect(world, "ssh")
    [login] = await world.credentials()
    await connect(world, "ssh")
    world.session(login, rx=1)
    await world.live.flush()
    assert await tunnels.end_expired() == 1
    assert [item.id for item in await tunnels.list_live(world.alice)] == [used.id]
    assert [item.connection for item in await world.credentials()] == [used.id]


def held(directory: Path, secret: bytes) -> list[str]:
    """The files that the secret can be read from."""
    return [path.name for path in sorted(directory.glob("controller.db*")) if secret in path.read_bytes()]
