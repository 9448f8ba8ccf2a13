"""Protocols of a fleet in a real database: what is set, what nodes get, and how far they are."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Any

import pytest
import sqlalchemy as sa

from controller.desired import service as desired_service
from controller.errors import InvalidInput
from controller.fleet.errors import ServerNotFound, UnknownProtocol
from controller.fleet.identities import Admitted
from controller.fleet.nodes import NodeSpec, NodeStatus
from controller.fleet.offer import Offer
from controller.fleet.progress import Progress
from controller.fleet.protocols import Protocols, ProtocolState
from controller.fleet.service import Fleet
from controller.fleet.settings import FleetSettings, ProtocolPools
from controller.fleet.tables import FleetKeyRow, NodeRow, ProtocolRow
from controller.fleet.vpnkeys import VpnKeys, load_keys
from controller.store.database import Committed, Database, Topic
from controller.store.types import now
from shared import desired
from shared.desired import Interface
from shared.resource import Protocol
from shared.services import L2tpServer, OpenVpnServer, SshServer
from tests.support.node_port import eventually

SETTINGS = FleetSettings(
    channel_address="192.0.2.1:8443",
    ipv4_pool=ip_network("10.66.0.0/16"),
    ipv6_pool=ip_network("fd66::/112"),
    dns=("9.9.9.9", "2620:fe::9"),
    pools=ProtocolPools(openvpn_ipv6="fd67::/112"),
)
ALL = tuple(Protocol)


@dataclass
class World:
    database: Database
    fleet: Fleet
    keys: VpnKeys
    protocols: Protocols
    progress: Progress

    async def node(self, name: str, *offers: Protocol, port: int | None = None) -> Admitted:
        await self.fleet.issue_join_token(NodeSpec(name=name, country="DE", city="Berlin", port=port))
        async with self.database.transaction() as tx:
            row = (await tx.session.scalars(sa.select(NodeRow).where(NodeRow.name == name))).one()
            row.enrolled_at, row.wireguard_public_key = now(), os.urandom(32)
            tx.touch(Topic.NODES)
        node = Admitted(row.id, name, "1", Offer())
        if offers:
            await self.protocols.offer(node, Offer(protocols=offers))
        return node

    async def runs(self, node: Admitted) -> dict[str, desired.Payload]:
        async with self.database.connect() as connection:
            scope = desired_service.node_scope(node.node_id)
            state = await desired_service.state(connection, self.database.secrets, scope)
        return {one.kind: desired.decode(one.kind, one.key, one.payload) for one in state.resources}

    async def says(self, node: Admitted, **servers: str) -> None:
        """The node acknowledges what there is, and what ails it."""
        scope = desired_service.node_scope(node.node_id)
        async with self.database.connect() as connection:
            (revision,) = (await desired_service.revisions(connection, [scope])).values()
        words = {Protocol(protocol): problem for protocol, problem in servers.items()}
        self.progress.applied(node.node_id, scope, revision, b"", None, words)
        await self.progress.flush()

    async def state(self, name: str, node: Admitted | None = None) -> ProtocolState:
        states = await self.protocols.list(node.node_id if node is not None else None)
        assert [state.name for state in states] == list(Protocol)
        return next(state for state in states if state.name == name)

    async def problems(self, name: str, node: Admitted | None = None, **changes: Any) -> dict[str, str]:
        """What is refused of the change; nothing at all has changed then."""
        before = await self.everything()
        with pytest.raises(InvalidInput) as refused:
            await self.protocols.configure(name, server_id=node.node_id if node is not None else None, **changes)
        assert await self.everything() == before
        return refused.value.problems

    async def everything(self) -> list[Any]:
        async with self.database.read() as session:
            return [
                [tuple(row) for row in await session.execute(sa.text(f"SELECT * FROM {table}"))]
                for table in ("desired", "scopes", "protocols", "fleet_keys", "nodes", "topics")
            ]


@pytest.fixture
async def world(database: Database) -> World:
    keys = await load_keys(database)
    protocols = Protocols(database, SETTINGS, keys)
    await protocols.refresh()
    return World(database, Fleet(database, bytes(32), SETTINGS), keys, protocols, Progress(database))


async def test_a_node_gets_the_servers_of_what_it_offers(world: World) -> None:
    node = await world.node("fra1", *ALL)
    runs = await world.runs(node)
    psk = world.protocols.server_of(node.node_id, Protocol.L2TP)
    assert isinstance(psk, L2tpServer)
    assert runs == {
        "wireguard.interface": Interface(name="sky0", listen_port=51820, addresses=("10.66.0.1/16", "fd66::1/112")),
        "openvpn.server": OpenVpnServer(
            port=1194,
            ipv4_pool="10.67.0.0/16",
            ipv6_pool="fd67::/112",
            dns=SETTINGS.dns,
            ca=world.keys.ca,
            tls_crypt=world.keys.tls_crypt_server_key,
        ),
        "ssh.server": SshServer(port=2222, ipv4_pool="10.68.0.0/16", dns=SETTINGS.dns),
        "l2tp.server": L2tpServer(psk=psk.psk, ipv4_pool="10.69.0.0/16", dns=("9.9.9.9",)),
    }
    for protocol in (Protocol.OPENVPN, Protocol.SSH, Protocol.L2TP):
        assert runs[f"{protocol}.server"] == world.protocols.server_of(node.node_id, protocol)


async def test_what_a_node_no_longer_offers_is_taken_from_it(world: World) -> None:
    node = await world.node("fra1", *ALL)
    await world.protocols.offer(node, Offer(protocols=(Protocol.SSH,)))
    assert set(await world.runs(node)) == {"ssh.server"}
    await world.protocols.offer(node, Offer())
    assert set(await world.runs(node)) == {"wireguard.interface"}


async def test_a_join_token_gives_no_interface_to_a_node_without_wireguard(world: World) -> None:
    node = await world.node("fra1", Protocol.SSH)
    await world.fleet.issue_join_token(NodeSpec(name="fra1", country="DE", city="Berlin", interface="wg0"))
    assert set(await world.runs(node)) == {"ssh.server"}
    await world.protocols.offer(node, Offer())
    interface = (await world.runs(node))["wireguard.interface"]
    assert isinstance(interface, Interface) and interface.name == "wg0"


async def test_the_offer_is_kept_with_the_node(world: World) -> None:
    node = await world.node("fra1")
    offer = Offer((Protocol.SSH,), ("ssh-ed25519 " + "A" * 68, "ssh-ed25519 " + "B" * 68), "ledger-1")
    await world.protocols.offer(node, offer)
    async with world.database.read() as session:
        row = await session.get_one(NodeRow, node.node_id)
    assert (row.protocols, row.ssh_host_keys, row.ledger) == ("ssh", "\n".join(offer.ssh_host_keys), "ledger-1")


async def test_a_new_ledger_alone_changes_no_server(world: World) -> None:
    node = await world.node("fra1")
    told: list[Committed] = []
    world.database.listen(told.append)
    await world.protocols.offer(node, Offer(ledger="new"))
    assert [(one.topics, one.scopes) for one in told] == [(frozenset({Topic.NODES}), frozenset())]


async def test_a_change_reaches_every_node_that_offers_the_protocol(world: World) -> None:
    one, two, other = [
        await world.node("one", Protocol.SSH),
        await world.node("two", *ALL),
        await world.node("other", Protocol.OPENVPN),
    ]
    state = await world.protocols.configure("ssh", port=2022, settings={"tcp_forwarding": True, "keepalive": 30})
    assert (state.port, state.settings) == (2022, {"tcp_forwarding": True, "tun": False, "keepalive": 30})
    for node in (one, two):
        server = (await world.runs(node))["ssh.server"]
        assert server == SshServer(port=2022, keepalive=30, ipv4_pool="10.68.0.0/16", dns=SETTINGS.dns)
    assert set(await world.runs(other)) == {"openvpn.server"}
    late = await world.node("late", Protocol.SSH)
    assert (await world.runs(late))["ssh.server"] == (await world.runs(one))["ssh.server"]


async def test_a_change_is_one_commit(world: World) -> None:
    nodes = [await world.node(f"n{number}", *ALL) for number in range(5)]
    told: list[Committed] = []
    world.database.listen(told.append)
    await world.protocols.configure("openvpn", port=443, settings={"transports": ["tcp"]})
    assert [one.scopes for one in told] == [frozenset(desired_service.node_scope(node.node_id) for node in nodes)]


async def test_the_same_settings_again_send_nothing(world: World) -> None:
    await world.node("fra1", *ALL)
    await world.protocols.configure("openvpn", port=443)
    told: list[Committed] = []
    world.database.listen(told.append)
    await world.protocols.configure("openvpn", port=443)
    await world.protocols.apply_settings()
    assert [one.scopes for one in told] == [frozenset()]


async def test_a_node_may_have_settings_of_its_own(world: World) -> None:
    one, two = await world.node("one", *ALL), await world.node("two", *ALL)
    own = await world.protocols.configure("openvpn", port=8443, settings={"mtu": 1300}, server_id=one.node_id)
    assert (own.port, own.settings["mtu"]) == (8443, 1300)
    await world.protocols.configure("openvpn", port=443, settings={"mtu": 1350, "keepalive": 20})
    ports = {node.name: (await world.state("openvpn", node)).port for node in (one, two)}
    assert ports == {"one": 8443, "two": 443}
    servers = [(await world.runs(node))["openvpn.server"] for node in (one, two)]
    assert [(server.port, server.mtu, server.keepalive) for server in servers if isinstance(server, OpenVpnServer)] == [
        (8443, 1300, 20),
        (443, 1350, 20),
    ]
    assert (await world.state("openvpn")).port == 443
    again = await world.protocols.configure("openvpn", settings={"mtu": None}, server_id=one.node_id)
    assert again.settings["mtu"] == 1350


async def test_wireguards_port_moves_on_nodes_that_were_given_none(world: World) -> None:
    plain, own = await world.node("plain"), await world.node("own", port=51900)
    assert (await world.state("wireguard")).port == 51820
    await world.protocols.configure("wireguard", port=51821, settings={"mtu": 1380, "isolate": False})
    late = await world.node("late")
    found = [(await world.runs(node))["wireguard.interface"] for node in (plain, own, late)]
    assert [(one.listen_port, one.mtu, one.isolate) for one in found if isinstance(one, Interface)] == [
        (51821, 1380, False),
        (51900, 1380, False),
        (51821, 1380, False),
    ]
    ports = [(await world.state("wireguard", node)).port for node in (plain, own)]
    assert (ports, (await world.state("wireguard")).port) == ([51821, 51900], 51821)
    async with world.database.read() as session:
        assert (await session.get_one(NodeRow, plain.node_id)).wireguard_port == 51821
    without = await world.node("without", Protocol.SSH)
    await world.protocols.configure("wireguard", port=51822)
    await world.protocols.offer(without, Offer())
    interface = (await world.runs(without))["wireguard.interface"]
    assert isinstance(interface, Interface) and interface.listen_port == 51822
    moved = await world.protocols.configure("wireguard", port=51901, server_id=own.node_id)
    assert moved.port == 51901


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        ("openvpn", {"port": 0}, {"port"}),
        (
            "openvpn",
            {"port": 70000, "settings": {"mtu": 100, "cipher": "x"}},
            {"port", "settings.mtu", "settings.cipher"},
        ),
        ("openvpn", {"settings": {"dns": ["one.one.one.one"]}}, {"settings.dns"}),
        ("openvpn", {"settings": {"dns": ["9.9.9.9\npush evil"]}}, {"settings.dns"}),
        ("openvpn", {"settings": {"dns": ["fe80::1%x\nms-wins 1"]}}, {"settings.dns"}),
        ("openvpn", {"settings": {"dns": ["::1%eth0"]}}, {"settings.dns"}),
        ("openvpn", {"settings": {"transports": []}}, {"settings.transports"}),
        ("openvpn", {"settings": {"max_clients": 0, "keepalive": 0}}, {"settings.max_clients", "settings.keepalive"}),
        ("openvpn", {"settings": {"mtu": "1400; rm"}}, {"settings.mtu"}),
        ("ssh", {"settings": {"tcp_forwarding": False}}, {"settings.tcp_forwarding"}),
        ("ssh", {"settings": {"keepalive": 2**70}}, {"settings.keepalive"}),
        ("l2tp", {"port": 1702}, {"port"}),
        ("l2tp", {"settings": {"psk": "short"}}, {"settings.psk"}),
        ("l2tp", {"settings": {"psk": 'quoted "\nkey'}}, {"settings.psk"}),
        ("l2tp", {"settings": {"dns": ["2620:fe::9"]}}, {"settings.dns"}),
        ("wireguard", {"port": -1, "settings": {"mtu": 99999}}, {"port", "settings.mtu"}),
    ],
)
async def test_a_bad_change_changes_nothing_and_names_each_field(
    world: World, name: str, changes: dict[str, Any], fields: set[str]
) -> None:
    node = await world.node("fra1", *ALL)
    assert set(await world.problems(name, **changes)) == fields
    assert set(await world.problems(name, node, **changes)) == fields


async def test_what_no_node_can_serve_is_refused_in_words(world: World) -> None:
    await world.node("fra1", Protocol.SSH)
    problems = await world.problems("ssh", settings={"tcp_forwarding": False})
    assert "without tcp_forwarding and tun it would do nothing" in problems["settings.tcp_forwarding"]
    await world.protocols.configure("ssh", settings={"tcp_forwarding": False, "tun": True})
    assert set(await world.problems("ssh", settings={"tun": False})) == {"settings.tun"}


async def test_a_port_in_use_is_refused(world: World) -> None:
    node = await world.node("fra1", *ALL, port=51900)
    assert await world.problems("openvpn", port=51820) == {"port": "51820/udp is in use by wireguard"}
    assert await world.problems("openvpn", port=51900) == {"port": "51900/udp is in use by wireguard on fra1"}
    assert await world.problems("wireguard", port=4500) == {"port": "4500/udp is in use by l2tp"}
    assert await world.problems("wireguard", node, port=1194) == {"port": "1194/udp is in use by openvpn on fra1"}
    assert await world.problems("ssh", port=1194) == {"port": "1194/tcp is in use by openvpn"}
    await world.protocols.configure("openvpn", settings={"transports": ["udp"]})
    await world.protocols.configure("ssh", port=1194)
    assert await world.problems("openvpn", settings={"transports": ["udp", "tcp"]}) == {
        "settings.transports": "1194/tcp is in use by ssh"
    }


async def test_protocols_and_nodes_that_are_not_there(world: World) -> None:
    with pytest.raises(UnknownProtocol):
        await world.protocols.configure("pptp", port=1723)
    with pytest.raises(ServerNotFound):
        await world.protocols.configure("ssh", port=2022, server_id="0192d1c0")
    with pytest.raises(ServerNotFound):
        await world.protocols.list("0192d1c0")


async def test_a_psk_is_written_and_never_shown(world: World) -> None:
    node = await world.node("fra1", Protocol.L2TP)
    first = world.protocols.server_of(node.node_id, Protocol.L2TP)
    state = await world.protocols.configure("l2tp", settings={"psk": "our very own key"})
    assert "psk" not in state.settings
    assert "psk" not in (await world.state("l2tp", node)).settings
    server = (await world.runs(node))["l2tp.server"]
    assert isinstance(server, L2tpServer) and server.psk == "our very own key"
    async with world.database.read() as session:
        texts = [row.settings for row in await session.scalars(sa.select(ProtocolRow))]
        sealed = [row.sealed_key for row in await session.scalars(sa.select(FleetKeyRow))]
    assert not any("our very own key" in text for text in texts)
    assert not any(b"our very own key" in key for key in sealed)
    await world.protocols.configure("l2tp", settings={"psk": "of this node only"}, server_id=node.node_id)
    assert world.protocols.server_of(node.node_id, Protocol.L2TP).psk == "of this node only"  # type: ignore[union-attr]
    assert world.protocols.server_of("another", Protocol.L2TP).psk == "our very own key"  # type: ignore[union-attr]
    await world.protocols.configure("l2tp", settings={"psk": None}, server_id=node.node_id)
    assert world.protocols.server_of(node.node_id, Protocol.L2TP).psk == "our very own key"  # type: ignore[union-attr]
    await world.protocols.configure("l2tp", settings={"psk": None})
    third = world.protocols.server_of(node.node_id, Protocol.L2TP)
    assert isinstance(first, L2tpServer) and isinstance(third, L2tpServer)
    assert third.psk not in (first.psk, "our very own key") and len(third.psk) == 20


async def test_a_protocol_applies_until_every_node_has_acknowledged(world: World) -> None:
    one, two = await world.node("one", *ALL), await world.node("two", *ALL)
    assert (await world.state("ssh")).status == "applying"
    await world.says(one)
    assert ((await world.state("ssh")).status, (await world.state("ssh", one)).status) == ("applying", "running")
    await world.says(two)
    assert {state.name: state.status for state in await world.protocols.list()} == dict.fromkeys(Protocol, "running")
    changed = await world.protocols.configure("ssh", port=2022)
    assert changed.status == "applying"
    assert (await world.state("openvpn")).status == "running"
    await world.says(one, ssh="port 2022 is taken by sshd")
    failing = await world.state("ssh")
    assert (failing.status, failing.problem) == ("error", "one: port 2022 is taken by sshd")
    assert (await world.state("openvpn")).status == "running"
    await world.says(one)
    await world.says(two)
    assert ((await world.state("ssh")).status, (await world.state("ssh")).problem) == ("running", None)


async def test_a_protocol_that_no_node_offers_is_stopped(world: World) -> None:
    node = await world.node("fra1", Protocol.WIREGUARD)
    assert {state.name: state.status for state in await world.protocols.list()} == {
        "wireguard": "applying",
        "openvpn": "stopped",
        "ssh": "stopped",
        "l2tp": "stopped",
    }
    assert (await world.state("ssh", node)).status == "stopped"
    configured = await world.protocols.configure("ssh", port=2022)
    assert (configured.status, configured.port) == ("stopped", 2022)


async def test_a_node_that_is_disabled_holds_nothing_up(world: World) -> None:
    away, here = await world.node("away", Protocol.SSH), await world.node("here", Protocol.SSH)
    await world.says(here)
    await world.fleet.set_status(away.name, NodeStatus.DISABLED)
    assert (await world.state("ssh")).status == "running"
    await world.fleet.set_status(here.name, NodeStatus.DISABLED)
    assert (await world.state("ssh")).status == "stopped"


async def test_what_a_node_says_of_its_servers_is_on_its_status(world: World) -> None:
    node = await world.node("fra1", *ALL)
    await world.says(node, openvpn="openvpn\x1b[31m is not installed", l2tp="no kernel module")
    (found,) = await world.fleet.nodes()
    assert found.servers == {"openvpn": "openvpn [31m is not installed", "l2tp": "no kernel module"}
    found, standings = await world.fleet.node("fra1")
    assert {protocol: one.words for protocol, one in standings.items()} == {
        "wireguard": "running",
        "openvpn": "openvpn [31m is not installed",
        "ssh": "running",
        "l2tp": "no kernel module",
    }
    await world.protocols.configure("ssh", port=2022)
    await world.says(node)
    (found,) = await world.fleet.nodes()
    assert found.servers == {}
    await world.protocols.configure("ssh", port=2023)
    _, standings = await world.fleet.node("fra1")
    assert (standings[Protocol.SSH].words, standings[Protocol.L2TP].words) == ("applying", "running")


async def test_another_controller_sees_the_change(world: World, database: Database) -> None:
    other = Protocols(database, SETTINGS, world.keys)
    await other.refresh()
    running = asyncio.create_task(other.run())
    await world.protocols.configure("ssh", port=2022)

    async def seen() -> bool:
        return other.server_of("any", Protocol.SSH).port == 2022

    await eventually(seen)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_settings_of_today_reach_all_servers_of_a_node(world: World) -> None:
    node = await world.node("fra1", *ALL)
    today = replace(SETTINGS, mtu=1380, pools=replace(SETTINGS.pools, ssh_ipv4="10.78.0.0/16"))
    await Protocols(world.database, today, world.keys).apply_settings()
    runs = await world.runs(node)
    interface, openvpn, ssh = (runs[kind] for kind in ("wireguard.interface", "openvpn.server", "ssh.server"))
    assert isinstance(interface, Interface) and interface.mtu == 1380
    assert isinstance(openvpn, OpenVpnServer) and openvpn.mtu == 1380
    assert isinstance(ssh, SshServer) and ssh.ipv4_pool == "10.78.0.0/16"


async def test_settings_are_stored_as_the_api_takes_them(world: World) -> None:
    await world.protocols.configure("openvpn", settings={"transports": ["tcp"], "mtu": 1300})
    async with world.database.read() as session:
        row = await session.get_one(ProtocolRow, ("openvpn", ""))
    assert (row.port, json.loads(row.settings)) == (0, {"transports": ["tcp"], "mtu": 1300})
