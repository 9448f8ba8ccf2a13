"""Every endpoint of the document, whole bodies, at both of its places."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from controller.accounts.principal import Plan
from controller.fleet.nodes import NodeStatus
from shared.keys import PrivateKey
from shared.protocol import Load
from tests.contracts.world import PASSWORD, Answer, Api, World

ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
MISSING = "0197a000-0000-7000-8000-000000000000"


def moment(text: str) -> datetime:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text)
    return datetime.fromisoformat(text)


def recent(text: str) -> bool:
    return abs(datetime.now(UTC) - moment(text)) < timedelta(minutes=1)


def refused(answer: Answer, status: int, words: str) -> None:
    assert (answer.status, answer.body) == (status, {"error": answer.body["error"], "code": status})
    assert words in answer.body["error"]


def refused_login(api: Api, answer: Answer, status: int, words: str) -> None:
    """At the shared place a login by user name fits IRSSH's document, too, and is refused in both shapes."""
    mine = {name: value for name, value in answer.body.items() if name != "detail"}
    assert set(answer.body) - set(mine) == (set() if api.prefix else {"detail"})
    refused(replace(answer, body=mine), status, words)


async def connect(api: Api, world: World, **more: object) -> str:
    answer = await api.post("/api/connections", {"server_id": world.nodes["fra-1"], "protocol": "wireguard", **more})
    assert answer.status == 201, answer
    connection_id: str = answer.body["connection_id"]
    return connection_id


async def test_login(api: Api, world: World) -> None:
    for name in ("alice", "Alice@example.com"):
        answer = await api.post("/api/auth/login", {"username": name, "password": PASSWORD})
        assert answer.status == 200
        documented = {"token", "expires_at"}
        # At the shared place a login by user name fits two documents, and answers both.
        assert set(answer.body) == (documented if api.prefix else documented | {"access_token", "token_type"})
        left = moment(answer.body["expires_at"]) - datetime.now(UTC)
        assert timedelta(hours=23, minutes=58) < left < timedelta(hours=24, minutes=1)
        assert (await api.holding(answer.body["token"]).get("/api/users/me")).status == 200


async def test_login_refused(api: Api) -> None:
    wrong = await api.post("/api/auth/login", {"username": "alice", "password": "a wrong guess"})
    unknown = await api.post("/api/auth/login", {"username": "nobody", "password": PASSWORD})
    refused_login(api, wrong, 401, "password is wrong")
    assert unknown.body == wrong.body
    assert wrong.headers["WWW-Authenticate"] == "Bearer"


async def test_logout(alice: Api, bob: Api) -> None:
    answer = await alice.post("/api/auth/logout")
    assert (answer.status, answer.body) == (200, {"message": "Logged out successfully"})
    refused(await alice.get("/api/servers"), 401, "log in again")
    refused(await alice.post("/api/auth/logout"), 401, "log in again")
    assert (await bob.get("/api/servers")).status == 200


async def test_servers(alice: Api, world: World) -> None:
    answer = await alice.get("/api/servers")
    assert answer.status == 200
    assert answer.body == [
        {"id": world.nodes["fra-1"], "name": "fra-1", "country": "DE", "ip": "198.51.100.10", "status": "online"}
    ]


async def test_servers_of_a_larger_plan_and_their_states(alice: Api, api: Api, world: World) -> None:
    await world.accounts.create_user("carol", "carol@example.com", PASSWORD, plan=Plan.ENTERPRISE)
    await world.add_node("lon-1", status=NodeStatus.MAINTENANCE)
    await world.add_node("off-1", status=NodeStatus.DISABLED)
    world.directory.set_online(world.nodes["fra-1"], False)
    seen = {server["name"]: server["status"] for server in (await (await api.login("carol")).get("/api/servers")).body}
    assert seen == {"fra-1": "offline", "lon-1": "maintenance", "nyc-1": "online"}
    assert {server["name"] for server in (await alice.get("/api/servers")).body} == {"fra-1", "lon-1"}


async def test_server(alice: Api, world: World) -> None:
    world.directory.set_load(world.nodes["fra-1"], Load(total=41.7, cpu=41.7, memory=0, bandwidth=0, peers=0))
    answer = await alice.get(f"/api/servers/{world.nodes['fra-1']}")
    assert answer.status == 200
    assert answer.body == {
        "id": world.nodes["fra-1"],
        "name": "fra-1",
        "country": "DE",
        "ip": "198.51.100.10",
        "status": "online",
        "load": 42,
    }


async def test_server_that_is_not_there_or_not_in_the_plan(alice: Api, world: World) -> None:
    missing = await alice.get(f"/api/servers/{MISSING}")
    refused(missing, 404, "no such server")
    assert (await alice.get(f"/api/servers/{world.nodes['nyc-1']}")).body == missing.body


async def test_create_a_connection(alice: Api, world: World) -> None:
    answer = await alice.post("/api/connections", {"server_id": world.nodes["fra-1"], "protocol": "wireguard"})
    assert answer.status == 201
    assert set(answer.body) == {"connection_id", "server_id", "status", "created_at"}
    assert ID.fullmatch(answer.body["connection_id"])
    assert (answer.body["server_id"], answer.body["status"]) == (world.nodes["fra-1"], "connecting")
    assert recent(answer.body["created_at"])
    assert "X-Applied" not in answer.headers


@pytest.mark.parametrize("applies", [True, False])
async def test_wait_until_the_server_has_applied_it(alice: Api, world: World, applies: bool) -> None:
    world.applies = applies
    wanted = {"server_id": world.nodes["fra-1"], "protocol": "wireguard"}
    answer = await alice.post("/api/connections?wait=applied", wanted)
    assert (answer.status, answer.headers["X-Applied"]) == (201, str(applies).lower())
    ended = await alice.call("DELETE", f"/api/connections/{answer.body['connection_id']}?wait=applied")
    assert (ended.status, ended.headers["X-Applied"]) == (200, str(applies).lower())
    refused(await alice.post("/api/connections?wait=soon", wanted), 400, "wait: ")


async def test_a_connection_that_cannot_be(alice: Api, bob: Api, world: World) -> None:
    node = world.nodes["fra-1"]
    refused(
        await alice.post("/api/connections", {"server_id": MISSING, "protocol": "wireguard"}), 404, "no such server"
    )
    refused(await alice.post("/api/connections", {"server_id": node, "protocol": "openvpn"}), 400, "does not offer")
    refused(await alice.post("/api/connections", {"server_id": node, "protocol": "pptp"}), 400, "protocol: ")
    refused(
        await alice.post("/api/connections", {"server_id": node, "protocol": "wireguard", "public_key": "AAAA"}),
        400,
        "public_key: ",
    )
    world.directory.set_online(node, False)
    refused(await alice.post("/api/connections", {"server_id": node, "protocol": "wireguard"}), 400, "offline")
    world.directory.set_online(node, True)
    await connect(bob, world)
    refused(await bob.post("/api/connections", {"server_id": node, "protocol": "wireguard"}), 403, "allows 1 conn")


async def test_a_connection_is_connected_once_its_peer_speaks(alice: Api, world: World) -> None:
    key = str(PrivateKey.generate().public())
    connection_id = await connect(alice, world, public_key=key, device_id="phone")
    before = await alice.get(f"/api/connections/{connection_id}")
    assert before.status == 200
    assert before.body == {
        "connection_id": connection_id,
        "server_id": world.nodes["fra-1"],
        "status": "connecting",
        "created_at": before.body["created_at"],
    }
    assert recent(before.body["created_at"])
    world.handshake("fra-1", key, rx=1840, tx=92410)
    after = await alice.get(f"/api/connections/{connection_id}")
    assert after.body == before.body | {"status": "connected"}


async def test_live_connections_with_their_traffic(alice: Api, bob: Api, world: World) -> None:
    key = str(PrivateKey.generate().public())
    connection_id = await connect(alice, world, public_key=key)
    world.handshake("fra-1", key, rx=1840, tx=92410)
    answer = await alice.get("/api/connections")
    assert answer.status == 200
    [found] = answer.body
    assert recent(found["latest_handshake"])
    assert found == {
        "connection_id": connection_id,
        "server_id": world.nodes["fra-1"],
        "status": "connected",
        "created_at": found["created_at"],
        "protocol": "wireguard",
        "addresses": found["addresses"],
        "rx": 1840,
        "tx": 92410,
        "latest_handshake": found["latest_handshake"],
        "refusal": None,
    }
    assert [address.rpartition("/")[2] for address in found["addresses"]] == ["32", "128"]
    assert (await bob.get("/api/connections")).body == []


async def test_end_a_connection(alice: Api, world: World) -> None:
    connection_id = await connect(alice, world)
    answer = await alice.call("DELETE", f"/api/connections/{connection_id}")
    assert (answer.status, answer.body) == (200, {"message": "Connection terminated"})
    refused(await alice.call("DELETE", f"/api/connections/{connection_id}"), 404, "no such connection")
    assert (await alice.get(f"/api/connections/{connection_id}")).body["status"] == "disconnected"
    refused(await alice.get(f"/api/connections/{connection_id}/config"), 404, "no such connection")
    assert (await alice.get("/api/connections")).body == []


async def test_somebody_elses_connection_is_like_one_that_is_not_there(alice: Api, bob: Api, world: World) -> None:
    theirs = await connect(alice, world)
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/config")):
        of_other = await bob.call(method, f"/api/connections/{theirs}{tail}")
        missing = await bob.call(method, f"/api/connections/{MISSING}{tail}")
        refused(of_other, 404, "no such connection")
        assert (of_other.status, of_other.raw) == (missing.status, missing.raw)
        strange = await bob.call(method, f"/api/connections/a%00b%0a';--{tail}")
        refused(strange, 404, "nothing at this path")
    assert (await alice.get(f"/api/connections/{theirs}")).body["status"] == "connecting"


async def test_config_of_a_key_pair_that_the_service_made(alice: Api, world: World) -> None:
    connection_id = await connect(alice, world)
    path = f"/api/connections/{connection_id}/config"
    conf = await alice.get(path, params={"format": "conf"})
    assert (conf.status, conf.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert conf.headers["Cache-Control"] == "no-store"
    as_json = await alice.get(path, params={"format": "json"})
    assert as_json.status == 200
    assert set(as_json.body) == {
        "addresses",
        "dns",
        "endpoint",
        "server_public_key",
        "allowed_ips",
        "mtu",
        "keepalive",
        "preshared_key",
        "private_key",
    }
    assert as_json.body["endpoint"] == "198.51.100.10:51820"
    assert f"PrivateKey = {as_json.body['private_key']}\n" in conf.raw.decode()
    svg = await alice.get(path, params={"format": "svg"})
    assert (svg.headers["Content-Type"], svg.raw[:5]) == ("image/svg+xml", b"<?xml")
    png = await alice.get(path, params={"format": "png"})
    assert (png.headers["Content-Type"], png.raw[:8]) == ("image/png", b"\x89PNG\r\n\x1a\n")


async def test_config_of_a_key_that_the_client_made(alice: Api, world: World) -> None:
    key = str(PrivateKey.generate().public())
    path = f"/api/connections/{await connect(alice, world, public_key=key)}/config"
    conf = (await alice.get(path)).raw.decode()
    assert not re.search(r"^PrivateKey", conf, re.MULTILINE)
    assert key in conf
    assert (await alice.get(path, params={"format": "json"})).body["private_key"] is None


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "text/plain; charset=utf-8"),
        ("application/json", "application/json"),
        ("application/vnd.skynet.v1+json", "application/json"),
        ("image/png;q=0.5, image/svg+xml;q=0.9", "image/svg+xml"),
        ("text/html, image/*", "image/svg+xml"),
    ],
)
async def test_config_by_accept(alice: Api, world: World, accept: str, media: str) -> None:
    path = f"/api/connections/{await connect(alice, world)}/config"
    assert (await alice.get(path, headers={"Accept": accept})).headers["Content-Type"] == media
    refused(await alice.get(path, headers={"Accept": "text/html"}), 406, "text/plain")
    refused(await alice.get(path, params={"format": "ovpn"}), 400, "format: ")


async def test_profile(alice: Api) -> None:
    answer = await alice.get("/api/users/me")
    assert answer.status == 200
    assert ID.fullmatch(answer.body["id"])
    assert recent(answer.body["created_at"])
    assert answer.body == {
        "id": answer.body["id"],
        "username": "alice",
        "email": "alice@example.com",
        "plan": "pro",
        "created_at": answer.body["created_at"],
    }


async def test_change_the_profile(alice: Api, api: Api) -> None:
    other = await api.login("alice")
    profile = (await alice.get("/api/users/me")).body
    answer = await alice.call("PATCH", "/api/users/me", {"email": "new@example.com", "password": "another good one"})
    assert answer.status == 200
    assert recent(answer.body["updated_at"])
    assert answer.body == {
        "id": profile["id"],
        "username": "alice",
        "email": "new@example.com",
        "plan": "pro",
        "updated_at": answer.body["updated_at"],
    }
    assert (await alice.get("/api/users/me")).body == profile | {"email": "new@example.com"}
    refused(await other.get("/api/users/me"), 401, "log in again")
    assert (await api.login("new@example.com", "another good one")).token


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"email": "bob@example.com"}, "email: another account has it"),
        ({"email": "nowhere"}, "email: "),
        ({"email": "a\n@example.com"}, "email: "),
        ({"password": "short"}, "password: use at least 8"),
        ({"password": "password1"}, "password: "),
        ({"password": 12345678}, "password: "),
    ],
)
async def test_a_change_that_cannot_be(alice: Api, change: dict[str, object], words: str) -> None:
    before = (await alice.get("/api/users/me")).body
    refused(await alice.call("PATCH", "/api/users/me", change), 400, words)
    assert (await alice.get("/api/users/me")).body == before


async def test_a_wrong_current_password(alice: Api) -> None:
    change = {"password": "another good one", "current_password": "a wrong guess"}
    refused(await alice.call("PATCH", "/api/users/me", change), 403, "current_password is wrong")


async def test_fields_that_are_nobodys_to_set_are_ignored(alice: Api, world: World) -> None:
    before = (await alice.get("/api/users/me")).body
    extra = {"role": "admin", "is_admin": True, "plan": "enterprise", "id": MISSING, "user_id": MISSING, "number": 1}
    extra |= {"balance": 10**9, "verified": True, "email_verified": True, "username": "root", "active": False}
    answer = await alice.call("PATCH", "/api/users/me", extra)
    assert answer.status == 200
    assert (await alice.get("/api/users/me")).body == before
    user = await world.accounts.get_user(before["id"])
    assert (user.role, user.plan, user.email_verified, user.active) == ("user", "pro", False, True)
    connection_id = await connect(alice, world, status="connected", user_id=MISSING, id="mine")
    assert connection_id != "mine"


async def test_a_deactivated_account_is_out_at_once_and_so_are_its_tunnels(alice: Api, world: World) -> None:
    await connect(alice, world)
    profile = (await alice.get("/api/users/me")).body
    user = await world.administration.user_by_name(profile["username"])
    await world.administration.update_user(user.number, active=False)
    refused(await alice.get("/api/connections"), 401, "log in again")
    async with world.database.connect() as connection:
        live = await connection.exec_driver_sql("SELECT count(*) FROM connections WHERE ended_at IS NULL")
        assert live.scalar_one() == 0
