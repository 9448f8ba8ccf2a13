"""WireGuard peers follow what their account may do."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from controller.access.service import Access
from controller.accounts.tables import UserRow
from controller.store.types import now
from controller.tunnels.peers import Peers
from controller.usage.tables import LimitsRow
from shared.access import Limits
from tests.controller.tunnels.conftest import SETTINGS


async def limit(world: Any, **columns: Any) -> None:
    """As another room writes it, which then tells the nodes."""
    access = Access(world.passwords, Peers(SETTINGS.pool).refresh)
    async with world.database.transaction() as tx:
        row = await tx.session.get(LimitsRow, world.alice.user_id)
        if row is None:
            row = LimitsRow(user_id=world.alice.user_id, quota_period="none", used_bytes=0, told="")
            tx.session.add(row)
        for name, value in columns.items():
            setattr(row, name, value)
        await access.refresh(tx, world.alice.user_id)


async def test_a_blocked_accounts_peers_go_and_come_back_as_they_were(world: Any) -> None:
    tunnels = world.tunnels()
    for node in (0, 1, 1):
        await tunnels.create(world.alice, "skynet", world.nodes[node], "wireguard")
    login = await tunnels.create(world.alice, "skynet", world.nodes[-1], "ssh")
    other = await tunnels.create(world.bob, "skynet", world.nodes[1], "wireguard")
    before = [await world.wanted(node) for node in (0, 1, -1)]
    await limit(world, quota_bytes=100, used_bytes=100)
    assert await world.wanted(0) == await world.wanted(-1) == []
    assert list(await world.peers(1)) == [other.public_key]
    assert len(await tunnels.list_live(world.alice)) == 4
    config = await tunnels.client_config(world.alice, login.id)
    await limit(world, quota_bytes=None, used_bytes=0)
    after = [await world.wanted(node) for node in (0, 1, -1)]
    assert [sorted(found, key=lambda item: item.key) for found in after] == [
        sorted(found, key=lambda item: item.key) for found in before
    ]
    assert await tunnels.client_config(world.alice, login.id) == config


async def test_a_connection_that_ends_while_blocked_does_not_come_back(world: Any) -> None:
    tunnels = world.tunnels()
    made = [await tunnels.create(world.alice, "skynet", world.nodes[-1], name) for name in ("wireguard", "ssh")]
    await limit(world, expires_at=now() - timedelta(seconds=1))
    for connection in made:
        await tunnels.terminate(world.alice, connection.id)
    await limit(world, expires_at=None)
    assert await world.wanted(-1) == []


async def test_new_limits_reach_the_peers_of_every_node(world: Any) -> None:
    tunnels = world.tunnels()
    for node in (0, 1):
        await tunnels.create(world.alice, "skynet", world.nodes[node], "wireguard")
    ends = now().replace(microsecond=0) + timedelta(hours=1)
    await limit(world, rate_up=1_000_000, expires_at=ends)
    for node in (0, 1):
        [peer] = (await world.peers(node)).values()
        assert peer.limits == Limits(rate_up=1_000_000)
        assert (peer.account, peer.not_after) == (world.alice.number, int(ends.timestamp()))


async def test_a_protocol_that_is_taken_away_and_given_back(world: Any) -> None:
    tunnels = world.tunnels()
    for protocol in ("wireguard", "openvpn", "ssh", "l2tp"):
        await tunnels.create(world.alice, "skynet", world.nodes[-1], protocol)
    before = await world.wanted(-1)
    access = Access(world.passwords, Peers(SETTINGS.pool).refresh)
    for allowed in ("ssh", "wireguard l2tp", "", None):
        async with world.database.transaction() as tx:
            chosen = sa.update(UserRow).where(UserRow.id == world.alice.user_id)
            await tx.session.execute(chosen.values(protocols=allowed))
            await access.grant(tx, world.alice.user_id, [], None)
        wanted = await world.wanted(-1)
        assert all(item in before for item in wanted)
        names = {getattr(item, "protocol", "wireguard") for item in wanted}
        assert names == ({"wireguard", "openvpn", "ssh", "l2tp"} if allowed is None else set(allowed.split()))


async def test_an_inactive_account_has_no_peers(world: Any) -> None:
    await world.tunnels().create(world.alice, "skynet", world.nodes[0], "wireguard")
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.update(UserRow).where(UserRow.id == world.alice.user_id).values(active=False))
    await limit(world)
    assert await world.peers() == {}
