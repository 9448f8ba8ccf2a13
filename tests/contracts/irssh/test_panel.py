"""Every endpoint of the panel's document, whole bodies, at both of its places."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controller.desired.service import node_scope, protocol_scope
from controller.store.types import now
from shared.access import Credential, SessionEnd
from shared.crypt import verify_password
from shared.protocol import Load
from shared.services import OpenVpnServer
from tests.contracts.world import PASSWORD, Answer, Api, World

from .conftest import Panel

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NEW = {"username": "dana", "email": "dana@example.com", "password": "tr0ub4dor and 3", "protocols": ["l2tp", "ssh"]}


def refused(answer: Answer, status: int, words: str) -> None:
    assert (answer.status, set(answer.body)) == (status, {"detail"})
    assert words in answer.body["detail"], answer.body


async def create(admin: Api, **changes: Any) -> dict[str, Any]:
    answer = await admin.post("/api/users", NEW | changes)
    assert answer.status == 201, answer.body
    body: dict[str, Any] = answer.body
    return body


async def test_login_answers_a_token_of_this_contract(api: Api, world: World, panel: Panel) -> None:
    answer = await api.post("/api/auth/login", {"username": "root-a", "password": PASSWORD})
    assert answer.status == 200
    documented = {"access_token", "token_type"}
    # At the shared place a login by user name fits two documents, and answers both.
    assert set(answer.body) == (documented if api.prefix else documented | {"token", "expires_at"})
    assert answer.body["token_type"] == "bearer"
    assert (await api.holding(answer.body["access_token"]).get("/api/users")).status == 200
    if not api.prefix:
        mine = await api.holding(answer.body["access_token"]).get("/api/users/me")
        theirs = await api.holding(answer.body["token"]).get("/api/users/me")
        assert (mine.status, mine.body) == (404, {"detail": "Resource not found"})
        assert theirs.body["username"] == "root-a"


async def test_login_refused(api: Api, panel: Panel) -> None:
    answer = await api.post("/api/auth/login", {"username": "root-a", "password": "a wrong guess"})
    assert (answer.status, answer.body["detail"]) == (401, "Invalid credentials")
    assert set(answer.body) == ({"detail"} if api.prefix else {"detail", "error", "code"})


async def test_refresh_replaces_the_token(admin: Api) -> None:
    answer = await admin.post("/api/auth/refresh")
    assert answer.status == 200
    assert set(answer.body) == {"access_token", "token_type"}
    refused(await admin.at("/irssh").get("/api/users"), 401, "Invalid credentials")
    newer = admin.holding(answer.body["access_token"])
    assert (await newer.get("/api/users")).status == 200
    refused(await admin.at("/irssh").post("/api/auth/refresh"), 401, "Invalid credentials")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/users"),
        ("POST", "/users"),
        ("GET", "/users/1"),
        ("PUT", "/users/1"),
        ("DELETE", "/users/1"),
        ("POST", "/users/1/kick"),
        ("GET", "/protocols"),
        ("PUT", "/protocols/ssh"),
        ("GET", "/monitoring/system"),
        ("GET", "/monitoring/users"),
    ],
)
async def test_everything_needs_an_administrator(alice: Api, method: str, path: str) -> None:
    refused(await alice.at("/irssh").call(method, f"/api{path}", {}), 403, "Not enough permissions")
    refused(await alice.at("/irssh").holding(None).call(method, f"/api{path}", {}), 401, "Invalid credentials")


async def test_users_are_listed(admin: Api, world: World) -> None:
    answer = await admin.get("/api/users")
    assert answer.status == 200
    assert set(answer.body) == {"users"}
    assert [user["username"] for user in answer.body["users"]] == ["alice", "bob", "root-a"]
    first = answer.body["users"][0]
    assert first == {
        "id": (await world.administration.user_by_name("alice")).number,
        "username": "alice",
        "email": "alice@example.com",
        "active": True,
        "created_at": first["created_at"],
    }
    assert MOMENT.fullmatch(first["created_at"])


async def test_a_created_user_has_a_login_of_each_protocol_on_every_node(admin: Api, panel: Panel) -> None:
    body = await create(admin, protocols=["wireguard", "l2tp", "ssh", "openvpn"])
    assert body == {
        "id": body["id"],
        "username": "dana",
        "email": "dana@example.com",
        "active": True,
        "created_at": body["created_at"],
        "protocols": ["wireguard", "openvpn", "ssh", "l2tp"],
    }
    assert isinstance(body["id"], int)
    for protocol in ("openvpn", "ssh", "l2tp"):
        login = (await panel.resources(protocol_scope(protocol)))[f"{protocol}/dana"]
        assert isinstance(login, Credential)
        assert login.account == body["id"]
        if protocol == "l2tp":
            assert login.secret == NEW["password"]
        else:
            assert verify_password(str(NEW["password"]), login.secret)
    assert (await admin.at("/irssh").post("/api/auth/login", {"username": "dana", "password": NEW["password"]})).body


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"username": "alice"}, "username"),
        ({"email": "Alice@Example.com"}, "email"),
        ({"username": "root"}, "username"),
        ({"username": "-oX"}, "username"),
        ({"username": "a;id"}, "username"),
        ({"username": "a/../x"}, "username"),
        ({"username": "é"}, "username"),
        ({"username": "x\nroot"}, "username"),
        ({"username": "a" * 65536}, "username"),
        ({"password": "short"}, "password"),
        ({"password": "line\nbreak here"}, "password"),
        ({"password": "colon: and \0 nul"}, "password"),
        ({"password": "p" * 300}, "password"),
        ({"password": "pässwörter für alle"}, "password"),  # MS-CHAPv2 says nothing of other characters
        ({"protocols": ["ssh", "telnet"]}, "protocols"),
        ({"protocols": "ssh"}, "protocols"),
        ({"email": "nobody"}, "email"),
    ],
)
async def test_a_user_that_cannot_be_is_refused_and_nothing_is_made(
    admin: Api, panel: Panel, change: dict[str, Any], words: str
) -> None:
    before = (await admin.get("/api/users")).body
    refused(await admin.post("/api/users", NEW | change), 400, words)
    assert (await admin.get("/api/users")).body == before
    assert await panel.resources(protocol_scope("ssh")) == {}


async def test_a_user_is_shown_with_limits_and_changed(admin: Api, panel: Panel) -> None:
    user = await create(admin)
    path = f"/api/users/{user['id']}"
    unlimited = {
        "quota_bytes": None,
        "quota_period": "none",
        "used_bytes": 0,
        "expires_at": None,
        "max_sessions": None,
        "rate_up": None,
        "rate_down": None,
    }
    assert (await admin.get(path)).body == user | unlimited
    ends = (datetime.now(UTC) + timedelta(days=30)).replace(microsecond=0)
    limits = {"quota_bytes": 10**10, "quota_period": "monthly", "max_sessions": 2, "rate_down": 5 * 10**7}
    wanted = limits | {"expires_at": ends.isoformat(), "email": "d@example.com", "protocols": ["ssh"]}
    answer = await admin.call("PUT", path, wanted)
    assert answer.status == 200
    shown = user | unlimited | limits | {"email": "d@example.com", "protocols": ["ssh"]}
    assert answer.body == shown | {"expires_at": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
    login = (await panel.resources(protocol_scope("ssh")))["ssh/dana"]
    assert isinstance(login, Credential)
    assert login.not_after == int(ends.timestamp())
    assert (login.limits.max_sessions, login.limits.rate_down, login.limits.metered) == (2, 5 * 10**7, True)
    assert await panel.resources(protocol_scope("l2tp")) == {}
    cleared = await admin.call("PUT", path, dict.fromkeys(("quota_bytes", "expires_at", "max_sessions", "rate_down")))
    assert cleared.body == shown | unlimited | {"quota_period": "monthly"}
    assert (await admin.call("PUT", path, {})).body == cleared.body


async def test_an_account_without_the_plain_password_needs_one_for_l2tp(admin: Api, panel: Panel) -> None:
    user = await create(admin, protocols=["ssh"])
    path = f"/api/users/{user['id']}"
    refused(await admin.call("PUT", path, {"protocols": ["ssh", "l2tp"]}), 400, "password")
    assert (await admin.get(path)).body["protocols"] == ["ssh"]
    changed = await admin.call("PUT", path, {"protocols": ["ssh", "l2tp"], "password": "another good one"})
    assert changed.body["protocols"] == ["ssh", "l2tp"]
    login = (await panel.resources(protocol_scope("l2tp")))["l2tp/dana"]
    assert isinstance(login, Credential)
    assert login.secret == "another good one"


async def test_a_new_password_reaches_every_login(admin: Api, panel: Panel) -> None:
    user = await create(admin, protocols=["ssh", "l2tp"])
    answer = await admin.call("PUT", f"/api/users/{user['id']}", {"password": "another good one"})
    assert answer.status == 200
    ssh = (await panel.resources(protocol_scope("ssh")))["ssh/dana"]
    l2tp = (await panel.resources(protocol_scope("l2tp")))["l2tp/dana"]
    assert isinstance(ssh, Credential)
    assert isinstance(l2tp, Credential)
    assert verify_password("another good one", ssh.secret)
    assert l2tp.secret == "another good one"


async def test_an_inactive_user_has_no_login_until_it_is_active_again(admin: Api, panel: Panel) -> None:
    user = await create(admin, protocols=["ssh"])
    path = f"/api/users/{user['id']}"
    assert (await admin.call("PUT", path, {"active": False})).body["active"] is False
    assert await panel.resources(protocol_scope("ssh")) == {}
    login = {"username": "dana", "password": NEW["password"]}
    assert (await admin.at("/irssh").post("/api/auth/login", login)).status == 401
    assert (await admin.call("PUT", path, {"active": True})).body["active"] is True
    assert list(await panel.resources(protocol_scope("ssh"))) == ["ssh/dana"]


@pytest.mark.parametrize(
    "change",
    [
        {"quota_bytes": -1},
        {"quota_bytes": 0},
        {"quota_bytes": 2**63},
        {"quota_bytes": 1.5},
        {"quota_bytes": "10"},
        {"quota_period": "yearly"},
        {"expires_at": "tomorrow"},
        {"expires_at": 1893456000},
        {"expires_at": "1893456000000"},
        {"expires_at": "2030-01-01T00:00:00"},
        {"expires_at": "0001-01-01T00:00:00+14:00"},
        {"expires_at": "9999-12-31T23:59:59-14:00"},
        {"expires_at": "1969-12-31T23:59:59Z"},
        {"max_sessions": 0},
        {"max_sessions": True},
        {"rate_up": -5},
        {"active": "no"},
        {"protocols": ["ssh", "telnet"]},
        {"email": "nobody"},
        {"email": "alice@example.com"},
        {"password": "short"},
    ],
)
async def test_a_bad_change_names_its_field_and_changes_nothing(admin: Api, change: dict[str, Any]) -> None:
    user = await create(admin)
    path = f"/api/users/{user['id']}"
    before = (await admin.get(path)).body
    refused(await admin.call("PUT", path, {"max_sessions": 5} | change), 400, next(iter(change)))
    assert (await admin.get(path)).body == before


async def test_fields_that_nobody_may_set_are_ignored(admin: Api) -> None:
    user = await create(admin, role="admin", is_admin=True, id=7, plan="enterprise", balance=1000)
    assert user["id"] != 7
    answer = await admin.call("PUT", f"/api/users/{user['id']}", {"role": "admin", "id": 1, "used_bytes": 0})
    assert answer.body["id"] == user["id"]
    dana = await admin.at("/irssh").post("/api/auth/login", {"username": "dana", "password": NEW["password"]})
    refused(await admin.at("/irssh").holding(dana.body["access_token"]).get("/api/users"), 403, "Not enough")


async def test_a_deleted_user_is_gone_everywhere(admin: Api, panel: Panel) -> None:
    user = await create(admin)
    path = f"/api/users/{user['id']}"
    answer = await admin.call("DELETE", path)
    assert (answer.status, answer.body) == (200, {"detail": "User deleted"})
    for scope in ("ssh", "l2tp"):
        assert await panel.resources(protocol_scope(scope)) == {}
    refused(await admin.call("DELETE", path), 404, "Resource not found")
    await create(admin)


@pytest.mark.parametrize("id", ["999999", "0", "-1", "abc", "1e3", "9" * 40, "0x1"])
async def test_users_that_are_not_there(admin: Api, id: str) -> None:
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/kick")):
        refused(await admin.call(method, f"/api/users/{id}{path}", {}), 404, "Resource not found")


async def test_the_last_administrator_cannot_be_deleted(admin: Api, world: World) -> None:
    number = (await world.administration.user_by_name("root-a")).number
    refused(await admin.call("DELETE", f"/api/users/{number}"), 400, "only administrator")


async def test_kick_ends_the_live_sessions(admin: Api, panel: Panel, world: World) -> None:
    user = await create(admin, protocols=["ssh", "openvpn"])
    await panel.session("dana", "ssh", "s1")
    await panel.session("dana", "openvpn", "s2")
    answer = await admin.post(f"/api/users/{user['id']}/kick")
    assert (answer.status, answer.body) == (200, {"kicked": 2})
    ends = await panel.resources(node_scope(world.nodes["all-1"]))
    assert {key for key, value in ends.items() if isinstance(value, SessionEnd)} == {"s1", "s2"}


async def test_protocols_are_listed(admin: Api, panel: Panel) -> None:
    await create(admin, protocols=["ssh"])
    await panel.session("dana", "ssh", "s1")
    await panel.session("dana", "ssh", "s2")
    answer = await admin.get("/api/protocols")
    assert answer.status == 200
    assert set(answer.body) == {"protocols"}
    found = {one["name"]: one for one in answer.body["protocols"]}
    assert list(found) == ["wireguard", "openvpn", "ssh", "l2tp"]
    assert found["ssh"] == {"name": "ssh", "status": found["ssh"]["status"], "port": 2222, "active_users": 1}
    assert found["l2tp"]["port"] == 1701


async def test_a_protocol_is_configured_on_all_servers_or_on_one(admin: Api, panel: Panel, world: World) -> None:
    answer = await admin.call("PUT", "/api/protocols/openvpn", {"port": 443, "settings": {"mtu": 1300}})
    assert answer.status == 200
    assert answer.body == {
        "name": "openvpn",
        "status": "applying",
        "port": 443,
        "active_users": 0,
        "settings": answer.body["settings"],
    }
    assert answer.body["settings"]["mtu"] == 1300
    node = world.nodes["all-1"]
    server = (await panel.resources(node_scope(node)))["openvpn"]
    assert isinstance(server, OpenVpnServer)
    assert (server.port, server.mtu) == (443, 1300)
    one = await admin.call("PUT", f"/api/protocols/openvpn?server_id={node}", {"port": 444})
    assert (one.body["port"], one.body["settings"]["mtu"]) == (444, 1300)
    listed = {found["name"]: found["port"] for found in (await admin.get("/api/protocols")).body["protocols"]}
    assert listed["openvpn"] == 443


@pytest.mark.parametrize(
    ("path", "change", "status", "words"),
    [
        ("ssh", {"port": 0}, 400, "port"),
        ("ssh", {"port": 70000}, 400, "port"),
        ("ssh", {"port": "22"}, 400, "port"),
        ("openvpn", {"port": 51820}, 400, "in use"),
        ("l2tp", {"port": 1702}, 400, "port"),
        ("ssh", {"settings": {"shell": True}}, 400, "shell"),
        ("openvpn", {"settings": {"mtu": "1400\nup /bin/sh"}}, 400, "mtu"),
        ("openvpn", {"settings": {"dns": ["1.1.1.1\nscript-security 2"]}}, 400, "dns"),
        ("openvpn", {"settings": {"transports": ["sctp"]}}, 400, "transports"),
        ("openvpn", {"settings": "mtu=1"}, 400, "settings"),
        ("telnet", {"port": 23}, 404, "Resource not found"),
        ("ssh?server_id=0197a000-0000-7000-8000-000000000000", {"port": 2022}, 404, "Resource not found"),
    ],
)
async def test_a_bad_configuration_changes_nothing(
    admin: Api, panel: Panel, world: World, path: str, change: dict[str, Any], status: int, words: str
) -> None:
    before = (await admin.get("/api/protocols")).body, await panel.resources(node_scope(world.nodes["all-1"]))
    refused(await admin.call("PUT", f"/api/protocols/{path}", change), status, words)
    after = (await admin.get("/api/protocols")).body, await panel.resources(node_scope(world.nodes["all-1"]))
    assert after == before


async def test_the_system_is_the_mean_of_the_servers(admin: Api, world: World) -> None:
    idle = {"cpu_usage": 0.0, "memory_usage": 0.0, "disk_usage": 0.0, "network_stats": {"in": 0.0, "out": 0.0}}
    assert (await admin.get("/api/monitoring/system")).body == idle
    for name, cpu, rate in (("fra-1", 10.0, 1000.0), ("all-1", 30.0, 3000.0)):
        load = Load(total=cpu, cpu=cpu, memory=40, bandwidth=1, peers=0, disk=50, rx_rate=rate, tx_rate=2 * rate)
        world.directory.set_load(world.nodes[name], load)
    answer = await admin.get("/api/monitoring/system")
    assert answer.status == 200
    assert answer.body == {
        "cpu_usage": 20.0,
        "memory_usage": 40.0,
        "disk_usage": 50.0,
        "network_stats": {"in": 2000.0, "out": 4000.0},
    }
    one = await admin.get(f"/api/monitoring/system?server_id={world.nodes['fra-1']}")
    assert (one.body["cpu_usage"], one.body["network_stats"]) == (10.0, {"in": 1000.0, "out": 2000.0})
    refused(await admin.get("/api/monitoring/system?server_id=nowhere"), 404, "Resource not found")


async def test_the_live_sessions_of_all_protocols(admin: Api, panel: Panel, world: World) -> None:
    await create(admin, protocols=["ssh", "openvpn"])
    start = int(now().timestamp()) - 60
    await panel.session("dana", "openvpn", "s2", since=start + 10)
    await panel.session("dana", "ssh", "s1", since=start)
    answer = await admin.get("/api/monitoring/users")
    assert answer.status == 200
    since = datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert answer.body == {
        "total_users": 4,
        "active_users": 1,
        "connections": [
            {"username": "dana", "protocol": "ssh", "connected_since": since, "ip_address": "2001:db8::7"},
            {
                "username": "dana",
                "protocol": "openvpn",
                "connected_since": answer.body["connections"][1]["connected_since"],
                "ip_address": "2001:db8::7",
            },
        ],
    }
