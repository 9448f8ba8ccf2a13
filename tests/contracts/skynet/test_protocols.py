"""Connections by OpenVPN, SSH and L2TP: whole bodies, at both places of the contract."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
import sqlalchemy as sa

from controller.accounts.principal import Plan
from controller.accounts.tables import UserRow
from controller.store.types import now
from controller.usage.tables import LimitsRow
from tests.contracts.skynet.test_endpoints import ID, connect, recent, refused
from tests.contracts.world import HOST_KEY, PASSWORD, Answer, Api, World

LOGINS = ["openvpn", "ssh", "l2tp"]
USERNAME = re.compile(r"sky-[a-z2-7]{12}")
GENERATED = re.compile(r"[A-Za-z0-9]{24}")


@pytest.fixture
async def world(world: World) -> World:
    await world.add_node("all-1", protocols="wireguard openvpn ssh l2tp")
    return world


async def start(api: Api, world: World, protocol: str, **more: object) -> str:
    answer = await api.post("/api/connections", {"server_id": world.nodes["all-1"], "protocol": protocol, **more})
    assert answer.status == 201, answer
    connection_id: str = answer.body["connection_id"]
    return connection_id


async def config(api: Api, connection_id: str, form: str) -> Answer:
    answer = await api.get(f"/api/connections/{connection_id}/config", params={"format": form})
    assert answer.headers["Cache-Control"] == "no-store"
    return answer


@pytest.mark.parametrize("protocol", LOGINS)
async def test_create_a_connection(alice: Api, world: World, protocol: str) -> None:
    wanted = {"server_id": world.nodes["all-1"], "protocol": protocol, "device_id": "phone"}
    answer = await alice.post("/api/connections?wait=applied", wanted)
    assert (answer.status, answer.headers["X-Applied"]) == (201, "true")
    assert ID.fullmatch(answer.body["connection_id"]) and recent(answer.body["created_at"])
    assert answer.body == {
        "connection_id": answer.body["connection_id"],
        "server_id": world.nodes["all-1"],
        "status": "connecting",
        "created_at": answer.body["created_at"],
    }
    assert (await alice.get(f"/api/connections/{answer.body['connection_id']}")).body == answer.body
    [live] = (await alice.get("/api/connections")).body
    assert live == answer.body | {
        "protocol": protocol,
        "addresses": [],
        "rx": 0,
        "tx": 0,
        "latest_handshake": None,
        "refusal": None,
    }


@pytest.mark.parametrize("protocol", LOGINS)
async def test_its_status_follows_its_sessions(alice: Api, world: World, protocol: str) -> None:
    connection_id = await start(alice, world, protocol)
    started = (await alice.get(f"/api/connections/{connection_id}")).body
    await world.session(connection_id, rx=1840, tx=92410)
    assert (await alice.get(f"/api/connections/{connection_id}")).body == started | {"status": "connected"}
    [live] = (await alice.get("/api/connections")).body
    assert recent(live["latest_handshake"])
    assert (live["status"], live["rx"], live["tx"]) == ("connected", 1840, 92410)
    await world.session(connection_id, rx=1841, tx=92411, ended=True)
    assert (await alice.get(f"/api/connections/{connection_id}")).body == started | {"status": "disconnected"}


async def test_the_config_of_openvpn(alice: Api, world: World) -> None:
    connection_id = await start(alice, world, "openvpn")
    told = (await config(alice, connection_id, "json")).body
    assert USERNAME.fullmatch(told["username"])
    assert told == {
        "protocol": "openvpn",
        "host": "198.51.100.10",
        "port": 1194,
        "transports": ["udp", "tcp"],
        "server_name": world.nodes["all-1"],
        **{name: told[name] for name in ("username", "ca", "certificate", "private_key", "tls_crypt_v2")},
    }
    conf = await config(alice, connection_id, "conf")
    assert (conf.status, conf.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert conf.headers["Content-Disposition"] == 'attachment; filename="skynetvpn.ovpn"'
    text = conf.raw.decode()
    assert text.startswith("# SkynetVPN all-1\nclient\n")
    assert "\nremote 198.51.100.10 1194 udp\nremote 198.51.100.10 1194 tcp\n" in text
    for tag, pem in {"ca": "ca", "cert": "certificate", "key": "private_key", "tls-crypt-v2": "tls_crypt_v2"}.items():
        assert f"\n<{tag}>\n{told[pem]}</{tag}>\n" in text
    path = f"/api/connections/{connection_id}/config"
    profile = await alice.get(path, headers={"Accept": "application/x-openvpn-profile"})
    assert profile.headers["Content-Type"] == "application/x-openvpn-profile; charset=utf-8"
    assert profile.raw == conf.raw


async def test_the_config_of_ssh(alice: Api, world: World) -> None:
    connection_id = await start(alice, world, "ssh")
    told = (await config(alice, connection_id, "json")).body
    assert USERNAME.fullmatch(told["username"]) and GENERATED.fullmatch(told["password"])
    assert told == {
        "protocol": "ssh",
        "host": "198.51.100.10",
        "port": 2222,
        "username": told["username"],
        "password": told["password"],
        "host_keys": [HOST_KEY],
        "tcp_forwarding": True,
        "tun": False,
        "tunnel": None,
    }
    conf = await config(alice, connection_id, "conf")
    assert (conf.status, conf.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert conf.headers["Content-Disposition"] == 'attachment; filename="skynetvpn-ssh.conf"'
    text = conf.raw.decode()
    assert f"# Password: {told['password']}\n" in text
    assert f"#   [198.51.100.10]:2222 {HOST_KEY}\n" in text
    assert "Host skynetvpn-all-1\n    HostName 198.51.100.10\n    Port 2222\n" in text


async def test_the_config_of_ssh_where_the_server_has_tun_devices(alice: Api, world: World) -> None:
    connection_id = await start(alice, world, "ssh")
    await world.protocols.configure("ssh", settings={"tcp_forwarding": False, "tun": True})
    told = (await config(alice, connection_id, "json")).body
    assert (told["tcp_forwarding"], told["tun"]) == (False, True)
    number = told["tunnel"]["number"]
    address = IPv4Address("10.68.0.1") + (number - 1_900_000_000)
    assert address in IPv4Network("10.68.0.0/16")
    assert told["tunnel"] == {
        "number": number,
        "address": str(address),
        "server_address": "10.68.0.1",
        "dns": ["9.9.9.9"],
    }
    text = (await config(alice, connection_id, "conf")).raw.decode()
    assert f"    TunnelDevice {number}:{number}\n    Tunnel point-to-point\n" in text
    assert f"# $ ip address add {address} peer 10.68.0.1 dev tun{number}\n" in text


async def test_the_config_of_l2tp(alice: Api, world: World) -> None:
    connection_id = await start(alice, world, "l2tp")
    told = (await config(alice, connection_id, "json")).body
    assert USERNAME.fullmatch(told["username"]) and GENERATED.fullmatch(told["password"]) and len(told["psk"]) >= 20
    assert told == {
        "protocol": "l2tp",
        "host": "198.51.100.10",
        "psk": told["psk"],
        "username": told["username"],
        "password": told["password"],
    }
    conf = await config(alice, connection_id, "conf")
    assert (conf.status, conf.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert conf.headers["Content-Disposition"] == 'attachment; filename="skynetvpn-l2tp.txt"'
    assert conf.raw.decode() == (
        "# SkynetVPN all-1\n# L2TP/IPsec with a pre-shared key\n"
        f"server: 198.51.100.10\npre-shared key: {told['psk']}\n"
        f"username: {told['username']}\npassword: {told['password']}\n"
    )


@pytest.mark.parametrize("protocol", LOGINS)
async def test_the_config_as_a_qr_code(alice: Api, world: World, protocol: str) -> None:
    connection_id = await start(alice, world, protocol)
    svg = await config(alice, connection_id, "svg")
    assert (svg.status, svg.headers["Content-Type"], svg.raw[:5]) == (200, "image/svg+xml", b"<?xml")
    png = await config(alice, connection_id, "png")
    assert (png.status, png.headers["Content-Type"], png.raw[:8]) == (200, "image/png", b"\x89PNG\r\n\x1a\n")


async def test_what_no_qr_code_holds_is_refused(alice: Api, world: World) -> None:
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.text("UPDATE nodes SET endpoint = :name"), {"name": ".".join(["a" * 60] * 4)})
    await world.directory.refresh()
    connection_id = await start(alice, world, "openvpn")
    for form in ("svg", "png"):
        refused(await config(alice, connection_id, form), 406, "ask for text/plain or application/json")
    assert (await config(alice, connection_id, "conf")).status == 200


async def test_a_profile_of_openvpn_is_of_openvpn_only(alice: Api, world: World) -> None:
    path = f"/api/connections/{await connect(alice, world)}/config"
    refused(await alice.get(path, headers={"Accept": "application/x-openvpn-profile"}), 406, "text/plain")


@pytest.mark.parametrize("protocol", LOGINS)
async def test_end_a_connection(alice: Api, bob: Api, world: World, protocol: str) -> None:
    connection_id = await start(alice, world, protocol)
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/config")):
        refused(await bob.call(method, f"/api/connections/{connection_id}{tail}"), 404, "no such connection")
    answer = await alice.call("DELETE", f"/api/connections/{connection_id}")
    assert (answer.status, answer.body) == (200, {"message": "Connection terminated"})
    refused(await alice.call("DELETE", f"/api/connections/{connection_id}"), 404, "no such connection")
    refused(await config(alice, connection_id, "json"), 404, "no such connection")
    assert (await alice.get(f"/api/connections/{connection_id}")).body["status"] == "disconnected"
    assert (await alice.get("/api/connections")).body == []


@pytest.mark.parametrize("protocol", LOGINS)
async def test_a_connection_that_cannot_be(alice: Api, bob: Api, world: World, protocol: str) -> None:
    async def ask(api: Api, node: str = "all-1", **more: object) -> Answer:
        return await api.post("/api/connections", {"server_id": world.nodes[node], "protocol": protocol, **more})

    refused(await ask(alice, "fra-1"), 400, "does not offer this protocol; it offers wireguard")
    refused(await ask(alice, public_key="A" * 42 + "E="), 400, "public_key: ")
    world.directory.set_online(world.nodes["all-1"], False)
    refused(await ask(alice), 400, "offline")
    world.directory.set_online(world.nodes["all-1"], True)
    assert (await ask(bob)).status == 201
    refused(await ask(bob), 403, "allows 1 conn")


async def test_an_account_that_may_not_use_the_protocol(api: Api, world: World) -> None:
    await world.accounts.create_user("carol", "carol@example.com", PASSWORD, plan=Plan.PRO, protocols=["ssh"])
    carol = await api.login("carol")
    for protocol in ("wireguard", "openvpn", "l2tp"):
        answer = await carol.post("/api/connections", {"server_id": world.nodes["all-1"], "protocol": protocol})
        refused(answer, 403, "may not use this protocol; it may use ssh")
    await start(carol, world, "ssh")


@pytest.mark.parametrize("columns", [{"expires_at": now}, {"quota_bytes": lambda: 10}], ids=["expired", "quota"])
async def test_an_account_that_is_blocked(alice: Api, world: World, columns: dict[str, Any]) -> None:
    values = {"quota_period": "none", "used_bytes": 10, "told": ""} | {name: make() for name, make in columns.items()}
    async with world.database.transaction() as tx:
        user_id = await tx.session.scalar(sa.select(UserRow.id).where(UserRow.username == "alice"))
        tx.session.add(LimitsRow(user_id=user_id, **values))
    for protocol in ("wireguard", *LOGINS):
        answer = await alice.post("/api/connections", {"server_id": world.nodes["all-1"], "protocol": protocol})
        refused(answer, 403, "may not connect now")
    assert (await alice.get("/api/servers")).status == 200
