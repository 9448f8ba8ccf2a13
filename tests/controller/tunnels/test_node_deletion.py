"""A node is deleted with all that is on it, and nothing of the others."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from controller.desired import service as desired
from controller.desired.tables import DesiredRow, ScopeRow
from controller.fleet.errors import NodeInService, NodeNotFound
from controller.fleet.layers import Layer
from controller.fleet.layerstore import write_layer
from controller.fleet.nodes import NodeSpec, NodeStatus
from controller.fleet.service import Fleet
from controller.fleet.tables import FleetKeyRow, JoinTokenRow, NodeRow, ProtocolRow
from controller.tunnels import ending, errors
from controller.tunnels.service import Tunnels
from controller.tunnels.tables import AllocationRow, ConnectionRow, ReportMarkRow
from controller.usage import granting
from controller.usage.sessions import Sessions
from controller.usage.tables import LeaseRow
from shared.resource import Protocol
from tests.controller.tunnels.conftest import FLEET, World


def fleet_of(world: World) -> Fleet:
    return Fleet(world.database, bytes(32), FLEET, [ending.forget_node, granting.forget_node])


async def names(world: World) -> dict[str, str]:
    async with world.database.read() as session:
        rows = await session.execute(sa.select(NodeRow.id, NodeRow.name))
    return {row.id: row.name for row in rows}


async def rows_of(world: World, node_id: str) -> set[str]:
    """The tables that have something of the node."""
    scope = desired.node_scope(node_id)
    conditions = {
        NodeRow.__tablename__: NodeRow.id == node_id,
        JoinTokenRow.__tablename__: JoinTokenRow.node_id == node_id,
        ProtocolRow.__tablename__: ProtocolRow.node_id == node_id,
        FleetKeyRow.__tablename__: FleetKeyRow.name.endswith(node_id),
        AllocationRow.__tablename__: AllocationRow.node_id == node_id,
        ConnectionRow.__tablename__: ConnectionRow.node_id == node_id,
        ReportMarkRow.__tablename__: ReportMarkRow.node_id == node_id,
        LeaseRow.__tablename__: LeaseRow.node_id == node_id,
        DesiredRow.__tablename__: DesiredRow.scope == scope,
        ScopeRow.__tablename__: ScopeRow.scope == scope,
    }
    async with world.database.connect() as connection:
        return {
            name
            for name, condition in conditions.items()
            if await connection.scalar(sa.select(sa.func.count()).where(condition))
        }


async def used(world: World, tunnels: Tunnels) -> tuple[Any, Any, Any]:
    """A connection that lives, one by OpenVPN with a session, and one that has ended, all on the last node."""
    node_id = world.nodes[-1]
    live = await tunnels.create(world.alice, "skynet", node_id, Protocol.WIREGUARD)
    other = await tunnels.create(world.alice, "skynet", node_id, Protocol.OPENVPN)
    ended = await tunnels.create(world.alice, "skynet", node_id, Protocol.WIREGUARD)
    await tunnels.terminate(world.alice, ended.id)
    world.report(live.public_key, 1, 1, world.ago(), node=-1)
    (credential,) = await world.credentials()
    world.session(credential, rx=5)
    lease = LeaseRow(node_id=node_id, user_id=world.alice.user_id, ledger="l", allowance=100, reserved=100, used=1)
    async with world.database.transaction() as tx:
        tx.session.add(lease)
        await write_layer(tx, Protocol.L2TP, node_id, Layer(settings={"psk": "of this node"}))
    await fleet_of(world).reissue_join_token((await names(world))[node_id])
    await world.live.flush()
    return live, other, ended


async def test_a_node_in_service_is_not_deleted(world: Any) -> None:
    fleet, tunnels = fleet_of(world), world.tunnels()
    await used(world, tunnels)
    node_id = world.nodes[-1]
    before = await rows_of(world, node_id)
    name = (await names(world))[node_id]
    with pytest.raises(NodeInService, match=f"'{name}' is enabled; disable it"):
        await fleet.delete(name)
    await fleet.set_status(name, NodeStatus.MAINTENANCE)
    with pytest.raises(NodeInService, match="is maintenance"):
        await fleet.delete(name)
    with pytest.raises(NodeNotFound):
        await fleet.delete("nobody")
    assert await rows_of(world, node_id) == before
    assert len(await tunnels.list_live(world.alice)) == 2


async def test_what_was_on_a_deleted_node_is_gone_and_all_else_stays(world: Any) -> None:
    fleet, tunnels = fleet_of(world), world.tunnels()
    kept = await tunnels.create(world.alice, "skynet", world.nodes[0], Protocol.WIREGUARD)
    world.report(kept.public_key, 7, 7, world.ago())
    gone = await used(world, tunnels)
    node_id = world.nodes[-1]
    name = (await names(world))[node_id]
    assert len(await rows_of(world, node_id)) == 10
    others = await rows_of(world, world.nodes[0])
    sessions = Sessions(world.database, world.live.book, ending.end_by_ids)
    assert {session.node_id for session in sessions.live()} == {world.nodes[0], node_id}
    await fleet.set_status(name, NodeStatus.DISABLED)

    await fleet.delete(name)
    await world.live.flush()
    await world.directory.refresh()

    assert await rows_of(world, node_id) == set()
    assert await rows_of(world, world.nodes[0]) == others
    for connection in gone:
        with pytest.raises(errors.ConnectionNotFound):
            await tunnels.get(world.alice, connection.id)
        assert world.live.get(connection.id) is None
    assert [item.id for item in await tunnels.list_live(world.alice)] == [kept.id]
    assert (await tunnels.get(world.alice, kept.id)).rx == 7
    assert {session.node_id for session in sessions.live()} == {world.nodes[0]}
    told = {session.node_id: session.end_reason for session in await sessions.history()}
    assert told[node_id] == "node_deleted"
    assert node_id not in {server.id for server in world.directory.servers(world.alice.plan)}
    await fleet.issue_join_token(NodeSpec(name=name, country="DE", city="Berlin"))
    assert name in (await names(world)).values() and node_id not in await names(world)


async def test_a_controller_that_starts_later_ends_the_sessions_of_a_deleted_node(world: Any) -> None:
    await used(world, world.tunnels())
    name = (await names(world))[world.nodes[-1]]
    fleet = fleet_of(world)
    await fleet.set_status(name, NodeStatus.DISABLED)
    await fleet.delete(name)
    later = world.new_live()
    await later.load()
    assert list(later.book) != []
    await later.flush()
    assert list(later.book) == []


async def test_the_reports_of_a_deleted_node_that_were_on_their_way_change_nothing(world: Any) -> None:
    live, _, _ = await used(world, world.tunnels())
    node_id = world.nodes[-1]
    name = (await names(world))[node_id]
    fleet = fleet_of(world)
    await fleet.set_status(name, NodeStatus.DISABLED)
    await fleet.delete(name)
    world.report(live.public_key, 9, 9, world.ago(), node=-1)
    await world.live.flush()
    world.report(live.public_key, 10, 10, world.ago(), node=-1)
    await world.live.flush()
    assert world.live.get(live.id) is None
    assert await rows_of(world, node_id) <= {ReportMarkRow.__tablename__}
