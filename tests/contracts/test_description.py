"""The OpenAPI document says what the API does, and the page for people loads nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from openapi_spec_validator import validate

from controller.accounts.service import Client
from shared.keys import PrivateKey
from tests.contracts.fuzz import drive
from tests.contracts.world import PASSWORD, Api, World


async def described(api: Api) -> dict[str, Any]:
    answer = await api.at("").get("/skynet/openapi.json")
    assert answer.status == 200
    found: dict[str, Any] = answer.body
    return found


async def test_the_document_is_valid_and_has_every_route(api: Api, world: World) -> None:
    document = await described(api)
    validate(document)
    assert document["openapi"] == "3.1.0"
    operations = {(method.upper(), path) for path, found in document["paths"].items() for method in found}
    assert operations == {(route.method, f"/api{route.path}") for route in world.skynet.routes}
    documented = {
        *(("POST", f"/api/auth/{name}") for name in ("login", "logout")),
        *(("GET", path) for path in ("/api/servers", "/api/servers/{id}", "/api/connections/{id}", "/api/users/me")),
        ("POST", "/api/connections"),
        ("DELETE", "/api/connections/{id}"),
        ("PATCH", "/api/users/me"),
    }
    assert documented <= operations


def check(document: dict[str, Any], method: str, path: str, status: int, body: object) -> None:
    """The body is as described, and has nothing that is not."""
    schema = document["paths"][path][method]["responses"][str(status)]["content"]["application/json"]["schema"]
    schema = {**schema, "components": document["components"]}
    jsonschema.validate(body, _closed(schema), cls=jsonschema.Draft202012Validator)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return closed | {"additionalProperties": False} if "properties" in closed and "type" in closed else closed


async def test_whole_answers_are_as_described(alice: Api, api: Api, world: World) -> None:
    document = await described(api)
    key = str(PrivateKey.generate().public())
    # At the shared place the answer of a login is more than this contract's.
    login = await api.at("/skynet").post("/api/auth/login", {"username": "alice", "password": PASSWORD})
    check(document, "post", "/api/auth/login", 200, login.body)
    started = await alice.post(
        "/api/connections", {"server_id": world.nodes["fra-1"], "protocol": "wireguard", "public_key": key}
    )
    check(document, "post", "/api/connections", 201, started.body)
    world.handshake("fra-1", key, rx=1, tx=2)
    one = f"/api/connections/{started.body['connection_id']}"
    for path, template in {
        "/api/servers": "/api/servers",
        f"/api/servers/{world.nodes['fra-1']}": "/api/servers/{id}",
        "/api/connections": "/api/connections",
        one: "/api/connections/{id}",
        f"{one}/config?format=json": "/api/connections/{id}/config",
        "/api/users/me": "/api/users/me",
    }.items():
        answer = await alice.get(path)
        check(document, "get", template, answer.status, answer.body)
    change = await alice.call("PATCH", "/api/users/me", {"email": "new@example.com"})
    check(document, "patch", "/api/users/me", 200, change.body)
    refused = await alice.call("PATCH", "/api/users/me", {"email": 7})
    check(document, "patch", "/api/users/me", 400, refused.body)
    check(document, "delete", "/api/connections/{id}", 200, (await alice.call("DELETE", one)).body)
    check(document, "post", "/api/auth/logout", 200, (await alice.post("/api/auth/logout")).body)
    check(document, "get", "/api/servers", 401, (await alice.get("/api/servers")).body)


async def test_configs_of_every_protocol_are_as_described(alice: Api, api: Api, world: World) -> None:
    document, node = await described(api), await world.add_node("all-1", protocols="wireguard openvpn ssh l2tp")
    for protocol in ("openvpn", "ssh", "l2tp"):
        started = await alice.post("/api/connections", {"server_id": node, "protocol": protocol})
        check(document, "post", "/api/connections", 201, started.body)
        answer = await alice.get(f"/api/connections/{started.body['connection_id']}/config?format=json")
        check(document, "get", "/api/connections/{id}/config", 200, answer.body)
        with pytest.raises(jsonschema.ValidationError):
            check(document, "get", "/api/connections/{id}/config", 200, answer.body | {"more": 1})
    check(document, "get", "/api/connections", 200, (await alice.get("/api/connections")).body)


async def test_examples_of_requests_are_what_is_accepted(world: World) -> None:
    for route in world.skynet.routes:
        if route.body is not None:
            route.body.model_validate(route.request_example)


class Assets(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := found.get(name)) is not None]
        self.inline += (tag == "script" and "src" not in found) + (tag == "style") + ("style" in found)
        self.inline += any(name.startswith("on") for name in found)


async def test_the_page_for_people_loads_its_own_assets_only(api: Api) -> None:
    home = api.at("")
    for path in ("/docs", "/docs/skynet", "/docs/irssh"):
        page = await home.get(path)
        assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert "unsafe" not in page.headers["Content-Security-Policy"]
        assets = Assets()
        assets.feed(page.raw.decode())
        assert assets.inline == 0
        assert assets.links
        for link in assets.links:
            assert link.startswith("/docs/assets/")
            asset = await home.get(link)
            assert asset.status == 200
            assert not re.search(rb"https?://|innerHTML|eval\(|@import", asset.raw)
    assert (await home.get("/docs/assets/contracts.json")).body == [
        {"name": "skynet", "title": "SkynetVPN API"},
        {"name": "irssh", "title": "IRSSH panel API"},
    ]
    assert (await home.get("/docs/nothing")).status == 404
    assert (await home.post("/docs")).status == 405


@pytest.mark.timeout(110)
async def test_no_generated_request_gets_an_answer_that_is_not_described(alice: Api, api: Api, world: World) -> None:
    async def token() -> str:
        return (await world.accounts.login("bob", PASSWORD, "skynet", Client()))[0]

    held, url = alice.token, api.url + api.prefix
    assert await drive(await described(api), url, held=held, fresh=token, spends="logout", examples=12) >= 60
