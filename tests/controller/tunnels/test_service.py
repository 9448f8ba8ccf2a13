"""Connections from their creation to their end, in a real database."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from controller.accounts.errors import InvalidToken
from controller.accounts.principal import Plan
from controller.accounts.tables import UserRow
from controller.errors import ErrorKind, InvalidInput
from controller.fleet.errors import ServerNotFound
from controller.fleet.nodes import NodeStatus
from controller.fleet.tables import NodeRow
from controller.store.types import now
from controller.tunnels import errors
from controller.tunnels.addresses import Pool
from controller.tunnels.ending import end_account, purge
from controller.tunnels.status import Status
from controller.tunnels.tables import AllocationRow, ConnectionRow

SMALL = Pool.parse("10.66.0.0/29", "fd66::/112")  # five clients


async def row_of(world: Any, connection_id: str) -> ConnectionRow:
    async with world.database.read() as session:
        row = await session.get(ConnectionRow, connection_id)
    assert row is not None
    return row


async def test_a_new_connection_is_connecting_and_its_peer_is_wanted_on_the_node(world: Any) -> None:
    tunnels, public_key = world.tunnels(), world.key()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard", public_key, "phone")
    assert (made.status, made.server_id, made.device_id) == (Status.CONNECTING, world.nodes[0], "phone")
    assert made.addresses == ("10.66.0.2/32", "fd66::2/128")
    peer = (await world.peers())[public_key]
    assert peer.allowed_ips == made.addresses
    config = await tunnels.client_config(world.alice, made.id)
    assert config.preshared_key is not None and config.preshared_key.raw == peer.preshared_key
    assert await tunnels.get(world.alice, made.id) == made
    assert await tunnels.list_live(world.alice) == [made]
    assert await world.peers(1) == {}


async def test_the_controller_makes_the_pair_and_keeps_it_sealed(world: Any) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    config = await tunnels.client_config(world.alice, made.id)
    assert config.private_key is not None
    assert str(config.private_key.public()) == made.public_key
    row = await row_of(world, made.id)
    assert config.private_key.raw not in (row.sealed_private_key or b"")
    await tunnels.terminate(world.alice, made.id)
    row = await row_of(world, made.id)
    assert (row.sealed_private_key, row.sealed_preshared_key) == (None, None)


async def test_a_client_made_key_stays_with_the_client(world: Any) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[1], "wireguard", world.key())
    shown = (await tunnels.client_config(world.alice, made.id)).to_json()
    assert shown["private_key"] is None
    assert shown["endpoint"] == "[2001:db8::7]:51820"


async def test_the_config_has_the_mtu_that_the_node_was_given(world: Any) -> None:
    tunnels = world.tunnels()
    made = [await tunnels.create(world.alice, "skynet", world.nodes[node], "wireguard") for node in (0, 1)]
    await world.protocols.configure("wireguard", settings={"mtu": 1380}, server_id=world.nodes[1])
    assert [(await tunnels.client_config(world.alice, one.id)).mtu for one in made] == [1420, 1380]


async def test_the_end_takes_the_peer_off_for_ever(world: Any) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    ended = await tunnels.terminate(world.alice, made.id)
    assert (ended.status, ended.end_reason) == (Status.DISCONNECTED, "terminated")
    assert await world.peers() == {}
    assert (await tunnels.get(world.alice, made.id)).status is Status.DISCONNECTED
    assert await tunnels.list_live(world.alice) == []
    for refused in (tunnels.terminate, tunnels.client_config):
        with pytest.raises(errors.ConnectionNotFound):
            await refused(world.alice, made.id)


async def test_a_foreign_connection_looks_like_one_that_is_not_there(world: Any) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    for use in (tunnels.get, tunnels.terminate, tunnels.client_config):
        said = []
        for connection_id in (made.id, "no-such-connection"):
            with pytest.raises(errors.ConnectionNotFound) as caught:
                await use(world.bob, connection_id)
            said.append((str(caught.value), caught.value.params))
        assert said[0] == said[1]
    assert len(await world.peers()) == 1


async def test_waiting_asks_for_the_revision_of_the_change(world: Any) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard", wait=3.0)
    ended = await tunnels.terminate(world.alice, made.id, wait=4.0)
    assert (made.applied, ended.applied) == (True, True)
    scope = f"node:{world.nodes[0]}"
    assert world.waits == [(world.nodes[0], scope, 1, 3.0), (world.nodes[0], scope, 2, 4.0)]


@pytest.mark.parametrize(
    "public_key",
    [
        "",
        "x" * 44,
        "A" * 43 + "=",
        base64.b64encode(b"k" * 31).decode(),
        base64.b64encode(b"k" * 32).decode() + "\n",
        "é",
    ],
)
async def test_a_bad_key_is_refused_and_named(world: Any, public_key: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await world.tunnels().create(world.alice, "skynet", world.nodes[0], "wireguard", public_key)
    assert list(caught.value.problems) == ["public_key"]
    assert await world.peers() == {}


async def test_the_servers_own_key_is_refused(world: Any) -> None:
    async with world.database.read() as session:
        own = await session.scalar(sa.select(NodeRow.wireguard_public_key).where(NodeRow.id == world.nodes[0]))
    with pytest.raises(InvalidInput, match="own key"):
        await world.tunnels().create(world.alice, "skynet", world.nodes[0], "wireguard", base64.b64encode(own).decode())


@pytest.mark.parametrize("device_id", ["", "a\nb", "x" * 65, "\u202eabc"])
async def test_a_bad_device_id_is_refused(world: Any, device_id: str) -> None:
    with pytest.raises(InvalidInput, match="device_id"):
        await world.tunnels().create(world.alice, "skynet", world.nodes[0], "wireguard", None, device_id)


async def test_a_key_that_somebody_else_uses_is_refused_until_it_is_free(world: Any) -> None:
    tunnels, public_key = world.tunnels(), world.key()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard", public_key)
    with pytest.raises(errors.PublicKeyInUse) as caught:
        await tunnels.create(world.bob, "skynet", world.nodes[0], "wireguard", public_key)
    assert caught.value.kind is ErrorKind.CONFLICT
    await tunnels.create(world.bob, "skynet", world.nodes[1], "wireguard", public_key)
    await tunnels.terminate(world.alice, made.id)
    await tunnels.create(world.bob, "skynet", world.nodes[0], "wireguard", public_key)


async def test_the_same_key_again_replaces_the_accounts_own_connection(world: Any) -> None:
    world.limits[Plan.PRO] = 1
    tunnels, public_key = world.tunnels(), world.key()
    first = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard", public_key)
    before = (await world.peers())[public_key]
    second = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard", public_key)
    after = (await world.peers())[public_key]
    assert second.id != first.id
    assert second.addresses == first.addresses
    assert after.preshared_key != before.preshared_key
    assert (await tunnels.get(world.alice, first.id)).end_reason == "replaced"
    assert [item.id for item in await tunnels.list_live(world.alice)] == [second.id]


async def test_a_server_that_is_away_takes_no_connection(world: Any) -> None:
    tunnels = world.tunnels()
    world.directory.set_online(world.nodes[0], False)
    with pytest.raises(errors.ServerUnavailable, match="offline") as caught:
        await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    assert caught.value.kind is ErrorKind.INVALID
    async with world.database.transaction() as tx:
        await tx.session.execute(
            sa.update(NodeRow).where(NodeRow.id == world.nodes[1]).values(status=NodeStatus.MAINTENANCE)
        )
    await world.directory.refresh()
    with pytest.raises(errors.ServerUnavailable, match="the server's status is maintenance;"):
        await tunnels.create(world.alice, "skynet", world.nodes[1], "wireguard")
    with pytest.raises(ServerNotFound):
        await tunnels.create(world.alice, "skynet", "nowhere", "wireguard")


async def test_a_protocol_that_the_server_does_not_offer_is_refused(world: Any) -> None:
    with pytest.raises(errors.ProtocolNotOffered, match="wireguard"):
        await world.tunnels().create(world.alice, "skynet", world.nodes[0], "openvpn")


async def test_an_account_that_was_suspended_meanwhile_gets_nothing(world: Any) -> None:
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.update(UserRow).where(UserRow.id == world.alice.user_id).values(active=False))
    with pytest.raises(InvalidToken):
        await world.tunnels().create(world.alice, "skynet", world.nodes[0], "wireguard")
    assert await world.peers() == {}


async def test_parallel_requests_cannot_pass_the_plans_limit(world: Any) -> None:
    tunnels = world.tunnels()
    outcomes = await asyncio.gather(
        *(tunnels.create(world.alice, "skynet", world.nodes[number % 2], "wireguard") for number in range(12)),
        return_exceptions=True,
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, errors.ConnectionLimitReached)]
    assert len(refused) == 7 and all("5" in str(error) for error in refused)
    assert len(await tunnels.list_live(world.alice)) == 5
    assert len(await world.peers(0)) + len(await world.peers(1)) == 5


async def test_parallel_requests_never_share_an_address(world: Any) -> None:
    principal = replace(world.alice, plan=Plan.ENTERPRISE)
    tunnels = world.tunnels()
    made = await asyncio.gather(*(tunnels.create(principal, "skynet", world.nodes[0], "wireguard") for _ in range(40)))
    assert len({address for connection in made for address in connection.addresses}) == 80
    assert len(await world.peers()) == 40


async def test_the_last_address_goes_to_one_of_two(world: Any) -> None:
    principal = replace(world.alice, plan=Plan.ENTERPRISE)
    tunnels = world.tunnels(pool=SMALL)
    for _ in range(4):
        await tunnels.create(principal, "skynet", world.nodes[0], "wireguard")
    outcomes = await asyncio.gather(
        *(tunnels.create(who, "skynet", world.nodes[0], "wireguard") for who in (principal, world.bob)),
        return_exceptions=True,
    )
    assert sorted(isinstance(outcome, errors.AddressesExhausted) for outcome in outcomes) == [False, True]
    assert len(await world.peers()) == 5


async def test_an_address_cools_down_before_it_serves_again(world: Any) -> None:
    tunnels = world.tunnels(pool=SMALL)
    made = [await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard") for _ in range(5)]
    for number in (3, 1):
        await tunnels.terminate(world.alice, made[number].id)
    with pytest.raises(errors.AddressesExhausted):
        await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    hasty = world.tunnels(pool=SMALL, cool_down=timedelta(0))
    again = [await hasty.create(world.alice, "skynet", world.nodes[0], "wireguard") for _ in range(2)]
    assert [connection.addresses for connection in again] == [made[3].addresses, made[1].addresses]


async def test_a_refused_connection_leaves_no_trace(world: Any) -> None:
    tunnels = world.tunnels(pool=SMALL)
    for _ in range(5):
        await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    with pytest.raises(errors.AddressesExhausted):
        await tunnels.create(world.bob, "skynet", world.nodes[0], "wireguard")
    async with world.database.read() as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(ConnectionRow)) == 5
        assert await session.scalar(sa.select(sa.func.count()).select_from(AllocationRow)) == 5


async def test_a_suspended_accounts_connections_end_on_every_node(world: Any) -> None:
    tunnels = world.tunnels()
    for node in (0, 1, 1):
        await tunnels.create(world.alice, "skynet", world.nodes[node], "wireguard")
    kept = await tunnels.create(world.bob, "skynet", world.nodes[1], "wireguard")
    async with world.database.transaction() as tx:
        assert await end_account(tx, world.alice.user_id, "suspended") == 3
    assert await world.peers(0) == {}
    assert list(await world.peers(1)) == [kept.public_key]
    assert await tunnels.list_live(world.alice) == []


async def test_an_account_can_be_deleted_once_its_connections_ended(world: Any) -> None:
    tunnels = world.tunnels()
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    async with world.database.transaction() as tx:
        await end_account(tx, world.alice.user_id, "deleted")
        await tx.session.execute(sa.delete(UserRow).where(UserRow.id == world.alice.user_id))
    with pytest.raises(errors.ConnectionNotFound):
        await tunnels.get(world.alice, made.id)
    again = await world.tunnels(pool=SMALL).create(world.bob, "skynet", world.nodes[0], "wireguard")
    assert again.addresses != made.addresses


async def test_unused_and_long_silent_connections_end_but_not_those_of_absent_nodes(world: Any) -> None:
    tunnels = world.tunnels(unused_after=timedelta(0), silent_after=timedelta(days=30))
    unused = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    absent = await tunnels.create(world.alice, "skynet", world.nodes[1], "wireguard")
    used = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    silent = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    world.report(used.public_key, 1, 1, world.ago(86400))
    world.report(silent.public_key, 1, 1, world.ago(31 * 86400))
    await world.live.flush()
    world.directory.set_online(world.nodes[1], False)
    assert await tunnels.end_expired() == 2
    assert {item.id for item in await tunnels.list_live(world.alice)} == {absent.id, used.id}
    assert (await tunnels.get(world.alice, unused.id)).end_reason == "expired"
    assert list(await world.peers(0)) == [used.public_key]


async def test_connections_that_ended_long_ago_are_forgotten(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.tunnels.ending._BATCH", 2)
    tunnels = world.tunnels()
    made = [await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard") for _ in range(4)]
    for connection in made[:3]:
        await tunnels.terminate(world.alice, connection.id)
    assert await purge(world.database, now() - timedelta(minutes=1)) == 0
    assert await purge(world.database, now() + timedelta(minutes=1)) == 3
    with pytest.raises(errors.ConnectionNotFound):
        await tunnels.get(world.alice, made[0].id)
    assert [connection.id for connection in await tunnels.list_live(world.alice)] == [made[3].id]


async def test_the_sweep_forgets_what_is_kept_no_longer(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.tunnels.service._SWEEP_INTERVAL", 0.01)
    tunnels = world.tunnels(kept=timedelta(0))
    made = await tunnels.create(world.alice, "skynet", world.nodes[0], "wireguard")
    await tunnels.terminate(world.alice, made.id)
    sweeping = asyncio.create_task(tunnels.run())
    with pytest.raises(errors.ConnectionNotFound):
        async with asyncio.timeout(30):
            while True:
                await tunnels.get(world.alice, made.id)
    sweeping.cancel()
