from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from controller.accounts.principal import Plan
from controller.desired import service as desired_service
from controller.fleet.nodes import NodeSpec
from controller.fleet.protocols import Protocols
from controller.fleet.service import Fleet
from controller.fleet.settings import FleetSettings
from controller.fleet.vpnkeys import load_keys
from controller.store.database import Committed, Database
from shared import desired, jointoken
from shared.desired import Interface

SETTINGS = FleetSettings(
    channel_address="192.0.2.1:8443", ipv4_pool=ip_network("10.66.0.0/16"), ipv6_pool=ip_network("fd66::/112")
)
SPEC = NodeSpec(name="fra1", country="DE", city="Frankfurt")


async def apply_settings(database: Database, settings: FleetSettings = SETTINGS) -> None:
    await Protocols(database, settings, await load_keys(database)).apply_settings()


async def interfaces(database: Database, node_id: str) -> list[desired.Payload]:
    async with database.connect() as connection:
        state = await desired_service.state(connection, database.secrets, desired_service.node_scope(node_id))
    return [desired.decode(one.kind, one.key, one.payload) for one in state.resources]


@pytest.fixture
def fleet(database: Database) -> Fleet:
    return Fleet(database, bytes(32), SETTINGS)


async def test_a_new_node_gets_its_interface_and_a_token_that_names_the_channel(
    fleet: Fleet, database: Database
) -> None:
    token = jointoken.decode(await fleet.issue_join_token(SPEC))
    assert (token.address, token.ca_pin) == ("192.0.2.1:8443", bytes(32))
    (node,) = await fleet.nodes()
    assert (node.name, node.country, node.city, node.enrolled_at) == ("fra1", "DE", "Frankfurt", None)
    assert await interfaces(database, node.id) == [
        Interface(name="sky0", listen_port=51820, addresses=("10.66.0.1/16", "fd66::1/112"), mtu=1420)
    ]


async def test_the_interface_of_a_node_is_given_and_stays_when_it_is_not_named(
    fleet: Fleet, database: Database
) -> None:
    adopted = Interface(name="wg0", listen_port=51900, addresses=("10.66.0.1/16", "fd66::1/112"), mtu=1420)
    await fleet.issue_join_token(replace(SPEC, interface="wg0", port=51900))
    (node,) = await fleet.nodes()
    assert await interfaces(database, node.id) == [adopted]
    await fleet.issue_join_token(SPEC)
    await apply_settings(database)
    assert await interfaces(database, node.id) == [adopted]


async def test_endpoint_and_plan_stay_when_they_are_not_named(fleet: Fleet) -> None:
    await fleet.issue_join_token(replace(SPEC, endpoint="vpn.example.com", plan=Plan.PRO))
    await fleet.issue_join_token(replace(SPEC, city="Berlin"))
    (node,) = await fleet.nodes()
    assert (node.city, node.endpoint, node.plan) == ("Berlin", "vpn.example.com", Plan.PRO)
    await fleet.issue_join_token(replace(SPEC, endpoint="192.0.2.7", plan=Plan.FREE))
    (node,) = await fleet.nodes()
    assert (node.endpoint, node.plan) == ("192.0.2.7", Plan.FREE)


async def test_another_interface_takes_the_place_of_the_former_one(fleet: Fleet, database: Database) -> None:
    await fleet.issue_join_token(SPEC)
    (node,) = await fleet.nodes()
    await fleet.issue_join_token(replace(SPEC, interface="wg0"))
    assert [payload.key for payload in await interfaces(database, node.id)] == ["wg0"]
    await fleet.issue_join_token(replace(SPEC, port=51900))
    (interface,) = await interfaces(database, node.id)
    assert isinstance(interface, Interface)
    assert (interface.name, interface.listen_port) == ("wg0", 51900)


async def test_settings_of_today_reach_the_nodes_and_the_same_ones_send_nothing(
    fleet: Fleet, database: Database
) -> None:
    await fleet.issue_join_token(SPEC)
    (node,) = await fleet.nodes()
    told: list[Committed] = []
    database.listen(told.append)
    await apply_settings(database)
    assert told == []
    await apply_settings(database, replace(SETTINGS, mtu=1380))
    assert [committed.scopes for committed in told] == [frozenset({desired_service.node_scope(node.id)})]
    (interface,) = await interfaces(database, node.id)
    assert isinstance(interface, Interface)
    assert interface.mtu == 1380
