"""The servers that requests read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from ipaddress import ip_network

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from controller.accounts.principal import Plan
from controller.fleet.directory import Directory, ServerStatus
from controller.fleet.errors import ServerNotFound
from controller.fleet.identities import Admitted
from controller.fleet.metrics import FleetMetrics
from controller.fleet.nodes import NodeSpec, NodeStatus
from controller.fleet.offer import Offer
from controller.fleet.protocols import Protocols
from controller.fleet.service import Fleet
from controller.fleet.settings import FleetSettings
from controller.fleet.tables import NodeRow
from controller.fleet.vpnkeys import load_keys
from controller.store.database import Database, Topic
from controller.store.types import now
from shared.protocol import Load
from shared.resource import Protocol
from tests.support.node_port import until


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def directory(database: Database, registry: CollectorRegistry) -> AsyncIterator[Directory]:
    running = Directory(database, FleetMetrics(registry))
    await running.refresh()
    task = asyncio.create_task(running.run())
    yield running
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def fleet(database: Database) -> Fleet:
    settings = FleetSettings(channel_address="127.0.0.1:8443", ipv4_pool=ip_network("10.66.0.0/16"))
    return Fleet(database, bytes(32), settings)


def load(total: float) -> Load:
    return Load(total=total, cpu=0, memory=0, bandwidth=0, peers=0)


async def enrolled(database: Database, fleet: Fleet, name: str, plan: Plan = Plan.FREE, host: str | None = None) -> str:
    await fleet.issue_join_token(NodeSpec(name=name, country="US", city="New York", endpoint=host, plan=plan))
    async with database.transaction() as tx:
        row = (await tx.session.scalars(sa.select(NodeRow).where(NodeRow.name == name))).one()
        row.wireguard_public_key, row.enrolled_at, row.address = os.urandom(32), now(), "203.0.113.9"
        tx.touch(Topic.NODES)
    return row.id


async def test_a_node_is_listed_once_it_is_enrolled(database: Database, directory: Directory, fleet: Fleet) -> None:
    await fleet.issue_join_token(NodeSpec(name="waiting", country="US", city="New York"))
    node_id = await enrolled(database, fleet, "us-1")
    await until(lambda: directory.servers(Plan.FREE))
    (server,) = directory.servers(Plan.FREE)
    assert (server.id, server.name, server.country, server.city) == (node_id, "us-1", "US", "New York")
    assert (server.host, server.wireguard_port, server.protocols) == ("203.0.113.9", 51820, ("wireguard",))
    assert (server.status, server.load) == (ServerStatus.OFFLINE, 0)
    assert directory.server(Plan.FREE, node_id) is server
    assert (directory.name(node_id), directory.name("gone")) == ("us-1", "gone")


async def test_the_endpoint_that_was_set_comes_before_the_address(
    database: Database, directory: Directory, fleet: Fleet
) -> None:
    await enrolled(database, fleet, "us-1", host="vpn.example.com")
    await until(lambda: directory.servers(Plan.FREE))
    assert directory.servers(Plan.FREE)[0].host == "vpn.example.com"


async def test_a_plan_sees_what_it_includes(database: Database, directory: Directory, fleet: Fleet) -> None:
    ids = {plan: await enrolled(database, fleet, plan, plan) for plan in Plan}
    await until(lambda: len(directory.servers(Plan.ENTERPRISE)) == 3)
    assert [server.name for server in directory.servers(Plan.FREE)] == ["free"]
    assert [server.name for server in directory.servers(Plan.PRO)] == ["free", "pro"]
    for missing in (ids[Plan.PRO], "01890a5d-ac96-774b-bcce-b302099a8057", ""):
        with pytest.raises(ServerNotFound):
            directory.server(Plan.FREE, missing)
    assert directory.known(ids[Plan.ENTERPRISE]).plan is Plan.ENTERPRISE


async def test_the_status_follows_the_session_and_the_administrator(
    database: Database, directory: Directory, fleet: Fleet
) -> None:
    node_id = await enrolled(database, fleet, "us-1")
    directory.set_online(node_id, True)  # also before the directory has seen the node
    directory.set_load(node_id, load(12.5))
    await until(lambda: directory.servers(Plan.FREE))
    assert directory.server(Plan.FREE, node_id).status == ServerStatus.ONLINE
    assert directory.server(Plan.FREE, node_id).load == 12
    before = directory.revision
    directory.set_load(node_id, load(99.9))
    assert directory.revision > before
    assert directory.server(Plan.FREE, node_id).load == 100
    before = directory.revision
    directory.set_load(node_id, load(100))
    assert directory.revision == before
    await fleet.set_status("us-1", NodeStatus.MAINTENANCE)
    await until(lambda: directory.server(Plan.FREE, node_id).status == ServerStatus.MAINTENANCE)
    await fleet.set_status("us-1", NodeStatus.ENABLED)
    await until(lambda: directory.server(Plan.FREE, node_id).status == ServerStatus.ONLINE)
    directory.set_online(node_id, False)
    assert directory.server(Plan.FREE, node_id).status == ServerStatus.OFFLINE
    assert directory.server(Plan.FREE, node_id).load == 0


@pytest.mark.parametrize("status", [NodeStatus.DISABLED, NodeStatus.LOCKED])
async def test_a_node_that_is_cut_off_is_not_offered_but_known(
    database: Database, directory: Directory, fleet: Fleet, registry: CollectorRegistry, status: NodeStatus
) -> None:
    node_id = await enrolled(database, fleet, "us-1")
    await until(lambda: directory.servers(Plan.FREE))
    await fleet.set_status("us-1", status)
    await until(lambda: not directory.servers(Plan.FREE))
    with pytest.raises(ServerNotFound):
        directory.server(Plan.FREE, node_id)
    assert directory.known(node_id).status == ServerStatus.OFFLINE
    assert registry.get_sample_value("skynetvpn_nodes", {"state": status}) == 1
    assert registry.get_sample_value("skynetvpn_nodes", {"state": "enabled"}) == 0


async def test_a_database_error_leaves_the_servers_listed(
    database: Database, directory: Directory, fleet: Fleet
) -> None:
    await enrolled(database, fleet, "us-1")
    await until(lambda: directory.servers(Plan.FREE))
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE nodes RENAME TO hidden"))
    with capture_logs() as logs:
        async with database.transaction() as tx:
            tx.touch(Topic.NODES)
        await until(lambda: any(entry["event"] == "fleet.directory_stale" for entry in logs))
    assert [server.name for server in directory.servers(Plan.FREE)] == ["us-1"]
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE hidden RENAME TO nodes"))
    await fleet.set_status("us-1", NodeStatus.MAINTENANCE)
    await until(lambda: directory.servers(Plan.FREE)[0].status == ServerStatus.MAINTENANCE)


async def test_a_server_has_what_its_node_says_of_itself(
    database: Database, directory: Directory, fleet: Fleet
) -> None:
    node_id = await enrolled(database, fleet, "us-1")
    await until(lambda: directory.servers(Plan.FREE))
    before = directory.known(node_id)
    assert (before.protocols, before.ssh_host_keys, before.ledger) == (("wireguard",), (), "")
    keys = tuple(f"ssh-ed25519 {letter * 68}" for letter in "AB")
    settings = FleetSettings(channel_address="127.0.0.1:8443", ipv4_pool=ip_network("10.66.0.0/16"))
    protocols = Protocols(database, settings, await load_keys(database))
    offer = Offer((Protocol.OPENVPN, Protocol.SSH), keys, "ledger-1")
    await protocols.offer(Admitted(node_id, "us-1", "1", Offer()), offer)
    await until(lambda: directory.known(node_id) != before)
    now_ = directory.known(node_id)
    assert (now_.protocols, now_.ssh_host_keys, now_.ledger) == (("openvpn", "ssh"), keys, "ledger-1")
    assert directory.server(Plan.FREE, node_id) == now_


async def test_the_latest_load_is_there_while_the_node_is(
    database: Database, directory: Directory, fleet: Fleet
) -> None:
    node_id = await enrolled(database, fleet, "us-1")
    await until(lambda: directory.servers(Plan.FREE))
    assert dict(directory.loads()) == {}
    directory.set_online(node_id, True)
    told = Load(total=40.4, cpu=40.4, memory=20, bandwidth=1, peers=0, disk=70, rx_rate=1e6, tx_rate=2e6)
    directory.set_load(node_id, told)
    assert dict(directory.loads()) == {node_id: told}
    assert directory.known(node_id).load == 40
    directory.set_online(node_id, False)
    assert dict(directory.loads()) == {}
