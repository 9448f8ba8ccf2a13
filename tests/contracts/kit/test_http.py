"""What the kit does with requests before and after a contract sees them, over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import io
import json
import pkgutil
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_network

import orjson
import pytest
from aiohttp import web
from structlog.testing import capture_logs

import controller
from controller.accounts.principal import Role
from controller.accounts.service import User
from controller.config import RateLimit
from controller.contracts.kit import Access, AccessLog, Call, Contract, Failure, Model, Reply, Route
from controller.contracts.kit.contract import Handler
from controller.contracts.kit.failures import STATUSES
from controller.contracts.kit.server import merged
from controller.errors import DomainError, ErrorKind, InvalidInput
from controller.log import add_request_id
from tests.contracts.world import PASSWORD, SETTINGS, Api, World, serve

OK_LOGIN = {"username": "alice", "password": PASSWORD}
AS_JSON = {"Content-Type": "application/json"}
DOCUMENTED_WORDS = {401: "Invalid credentials", 403: "Not enough permissions", 404: "Resource not found"}  # of irssh


class Note(Model):
    text: str
    size: float = 0
    tags: tuple[str, ...] = ()


class Detail(Model):
    detail: str


class Tiny:
    """A second contract, in IRSSH's manner: errors are {detail}, logins are by user name."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.error: Exception | None = None

    async def check(self, call: Call) -> object:
        given = call.body_as(Note)
        return await self.world.accounts.verify(given.text, PASSWORD, call.client)

    async def echo(self, call: Call) -> Reply:
        if self.error is not None:
            raise self.error
        return Reply({"got": call.body.model_dump() if call.body is not None else None})

    def contract(self) -> Contract:
        async def admin_only(call: Call) -> Reply:
            return Reply({"user": call.user.username})

        return Contract(
            name="tiny",
            title="Tiny",
            description="",
            base="/api",
            routes=(
                Route(method="GET", path="/fail", access=Access.PUBLIC, handler=self.echo, summary="", answer=Note),
                Route(
                    method="POST",
                    path="/notes",
                    access=Access.PUBLIC,
                    handler=self.echo,
                    summary="",
                    answer=Note,
                    body=Note,
                ),
                Route(method="GET", path="/secret", access=Access.ADMIN, handler=admin_only, summary="", answer=Note),
                Route(method="GET", path="/servers", access=Access.USER, handler=self.echo, summary="", answer=Note),
            ),
            envelope=_detail,
            error=Detail,
            rate_headers=True,
        )


def _detail(failure: Failure) -> dict[str, object]:
    return {"detail": failure.message}


@pytest.fixture
def tiny(world: World) -> Tiny:
    return Tiny(world)


@pytest.fixture
async def both(world: World, tiny: Tiny) -> AsyncIterator[Api]:
    async with serve(world, world.skynet, tiny.contract()) as api:
        yield api


def every_domain_error() -> list[type[DomainError]]:
    for module in pkgutil.walk_packages(controller.__path__, "controller."):
        if "migrations" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, queue = [], [DomainError]
    while queue:
        for cls in queue.pop().__subclasses__():
            queue.append(cls)
            if cls.__module__.startswith("controller."):
                found.append(cls)
    return found


def make(cls: type[DomainError]) -> DomainError:
    if cls is InvalidInput:
        return InvalidInput({"field": "is wrong"})
    error = cls.__new__(cls)
    error.params = {}
    Exception.__init__(error, cls.message)
    return error


async def test_every_error_of_the_controller_is_told_in_every_contracts_shape(
    world: World, tiny: Tiny, both: Api
) -> None:
    classes = every_domain_error()
    assert len(classes) >= 20
    assert set(STATUSES) == set(ErrorKind)
    for cls in classes:
        error = make(cls)
        status = STATUSES[error.kind]
        for contract in (world.skynet, world.irssh, tiny.contract()):
            told = contract.statuses.get(status, status)
            failing = replace(
                contract,
                routes=tuple(
                    replace(route, access=Access.PUBLIC, body=None, query=None, prepare=None, handler=_raiser(error))
                    for route in contract.routes[:1]
                ),
            )
            async with serve(world, failing) as api:
                route = failing.routes[0]
                answer = await api.call(route.method, f"/{failing.name}{failing.base}{route.path}")
            assert answer.status == told
            expected = {
                "skynet": {"error": str(error), "code": told},
                "irssh": {"detail": DOCUMENTED_WORDS.get(told, str(error))},
                "tiny": {"detail": str(error)},
            }
            assert answer.body == expected[contract.name]
            assert ("Retry-After" in answer.headers) == (told in (429, 503))
            assert told in {400, 401, 403, 404, 500, 429, 503} or contract.name == "tiny"


def _raiser(error: Exception) -> Handler:
    async def fail(call: Call) -> Reply:
        raise error

    return fail


async def test_every_route_declares_its_access_and_keeps_it(world: World, both: Api) -> None:
    public = {("POST", "/auth/login")}
    for route in world.skynet.routes:
        assert isinstance(route.access, Access)
        assert (route.access is Access.PUBLIC) == ((route.method, route.path) in public), route.path
        if route.access is not Access.PUBLIC:
            path = f"/skynet/api{route.path}".replace("{id}", "0197a000-0000-7000-8000-000000000000")
            answer = await both.call(route.method, path, {})
            assert (answer.status, set(answer.body)) == (401, {"error", "code"}), route.path


async def test_admin_routes_need_the_role(world: World, both: Api) -> None:
    await world.accounts.create_user("boss", "boss@example.com", PASSWORD, Role.ADMIN)
    alice, boss = await both.login("alice"), await both.login("boss")
    assert (await both.get("/api/secret")).status == 401
    refused = await alice.get("/api/secret")
    assert (refused.status, refused.body) == (403, {"detail": "this needs the admin role"})
    assert (await boss.get("/api/secret")).body == {"user": "boss"}


async def test_a_token_carries_its_contract(both: Api) -> None:
    alice = await both.login("alice")
    assert isinstance((await alice.get("/api/servers")).body, list)  # documented by both; the token is skynet's
    assert (await alice.get("/tiny/api/servers")).body == {"got": None}
    assert (await both.get("/api/servers")).body == {
        "error": "the token is missing, wrong or has ended; log in again",
        "code": 401,
    }


def test_the_union_of_two_failures_has_the_fields_of_both() -> None:
    assert merged({"error": "no", "code": 401}, {"detail": "no"}) == {"error": "no", "code": 401, "detail": "no"}
    prime = {"error": {"code": "UNAUTHORIZED", "message": "no", "details": [], "request_id": "r"}}
    cloudvps = {"success": False, "error": {"code": "X", "message": "no", "details": {}}}
    assert merged(prime, cloudvps) == {"success": False, **prime}


async def test_a_login_that_fits_two_contracts_is_answered_by_both_with_a_token_each(world: World) -> None:
    skynet = world.skynet
    login = skynet.routes[0]
    checks = 0

    async def check(call: Call) -> object:
        nonlocal checks
        checks += 1
        assert login.prepare is not None
        return await login.prepare(call)

    async def other_login(call: Call) -> Reply:
        token, _ = await world.accounts.open_session(call.prepared_as(User), call.contract, call.client)
        return Reply({"access_token": token, "token_type": "bearer"})

    first = replace(skynet, routes=(replace(login, prepare=check), *skynet.routes[1:]))
    second = replace(
        Tiny(world).contract(),
        routes=(replace(login, handler=other_login, prepare=check), *Tiny(world).contract().routes),
    )
    async with serve(world, first, second) as api:
        answer = await api.post("/api/auth/login", OK_LOGIN)
        assert answer.status == 200
        assert set(answer.body) == {"token", "expires_at", "access_token", "token_type"}
        assert checks == 1
        contracts = {
            (await world.accounts.authenticate(answer.body[name])).contract for name in ("token", "access_token")
        }
        assert contracts == {"skynet", "tiny"}
        assert isinstance((await api.holding(answer.body["token"]).get("/api/servers")).body, list)
        assert (await api.holding(answer.body["access_token"]).get("/api/servers")).body == {"got": None}
        wrong = await api.post("/api/auth/login", {**OK_LOGIN, "password": "a wrong guess"})
        assert (wrong.status, set(wrong.body)) == (401, {"error", "code", "detail"})
        alone = await api.post("/skynet/api/auth/login", OK_LOGIN)
        assert set(alone.body) == {"token", "expires_at"}


async def test_unknown_paths_and_methods(both: Api) -> None:
    missing = await both.get("/api/nothing")
    assert (missing.status, missing.body) == (404, {"error": "there is nothing at this path", "code": 404})
    assert (await both.get("/tiny/api/nothing")).body == {"detail": "there is nothing at this path"}
    assert (await both.get("/nothing/at/all")).status == 404
    for method in ("DELETE", "PUT", "TRACE", "PROPFIND", "OPTIONS"):
        other = await both.call(method, "/skynet/api/servers")
        assert (other.status, other.headers["Allow"], set(other.body)) == (405, "GET, HEAD", {"error", "code"})
    old = await both.get("/api/servers", headers={"Accept": "application/vnd.tiny.v2+json"})
    assert (old.status, set(old.body)) == (406, {"detail"})


async def test_request_ids(both: Api) -> None:
    given = await both.get("/api/nothing", headers={"X-Request-ID": "abc-123"})
    assert given.headers["X-Request-ID"] == "abc-123"
    made = {
        (await both.get("/api/nothing", headers={"X-Request-ID": odd})).headers["X-Request-ID"]
        for odd in ("", "a b", "x" * 65, "<b>")
    }
    assert len(made) == 4


async def test_what_is_logged_during_a_request_tells_its_id(tiny: Tiny, both: Api) -> None:
    tiny.error = RuntimeError("unforeseen")
    with capture_logs(processors=[add_request_id]) as logs:
        await both.get("/api/fail", headers={"X-Request-ID": "abc-124"})
        await both.get("/api/fail", headers={"X-Request-ID": "abc-125"})
    assert [entry["request_id"] for entry in logs] == ["abc-124", "abc-125"]
    assert [line["request_id"] for line in both.access_log()] == ["abc-124", "abc-125"]


async def test_headers_of_every_answer(both: Api) -> None:
    alice = await both.login("alice")
    for answer in (await alice.get("/api/servers"), await both.get("/api/servers"), await both.get("/docs")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Server"] == "skynetvpn"
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert (await alice.get("/api/servers")).headers["Cache-Control"] == "no-store"
    head = await alice.call("HEAD", "/api/servers")
    assert (head.status, head.raw) == (200, b"")


async def test_no_origin_is_allowed_unless_it_is_configured(world: World) -> None:
    asked = {"Origin": "https://panel.example.com", "Access-Control-Request-Method": "POST"}
    async with serve(world) as api:
        assert (await api.call("OPTIONS", "/api/servers", headers=asked)).status == 405
    async with serve(world, settings=replace(SETTINGS, cors_origins=frozenset({"https://panel.example.com"}))) as api:
        preflight = await api.call("OPTIONS", "/api/servers", headers=asked)
        assert (preflight.status, preflight.headers["Access-Control-Allow-Origin"]) == (204, asked["Origin"])
        other = await api.get("/api/servers", headers={"Origin": "https://evil.example.com"})
        assert "Access-Control-Allow-Origin" not in other.headers
        assert "Access-Control-Allow-Credentials" not in preflight.headers


BAD_BODIES = {
    "empty": b"",
    "not JSON": b"{",
    "not an object": b"[]",
    "null": b"null",
    "text": b'"x"',
    "trailing": b"{} {}",
    "not UTF-8": b'{"text": "\xff"}',
    "half a surrogate": b'{"text": "\\ud800"}',
    "NaN": b'{"text": "x", "size": NaN}',
    "too large a number": b'{"text": "x", "size": 1e999}',
    "too long a number": b'{"text": "x", "size": 1' + b"0" * 5000 + b"}",
    "a number as text": b'{"text": "x", "size": "1"}',
    "text as a number": b'{"text": 1}',
    "true as a number": b'{"text": "x", "size": true}',
    "twice": b'{"text": "x", "text": "y"}',
    "twice, deeper": b'{"text": "x", "more": {"a": 1, "a": 2}}',
    "an item of the wrong type": b'{"text": "x", "tags": ["a", 2]}',
    "deep list": b"[" * 60_000,
    "deep object": b'{"a":' * 12_000,
    "deep and closed": b'{"text": "x", "more": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "missing": b"{}",
}


@pytest.mark.parametrize("raw", BAD_BODIES.values(), ids=BAD_BODIES.keys())
async def test_a_bad_body_is_refused_and_its_field_named(both: Api, raw: bytes) -> None:
    answer = await both.call("POST", "/api/notes", data=raw, headers={"Content-Type": "application/json"})
    assert (answer.status, set(answer.body)) == (400, {"detail"}), answer
    assert any(answer.body["detail"].startswith(f"{name}: ") for name in ("body", "text", "size", "tags.1", "a"))


async def test_a_good_body_is_taken_and_unknown_fields_ignored(both: Api) -> None:
    for media in ("application/json", "application/json; charset=utf-8", "application/vnd.tiny.v1+json"):
        raw = json.dumps({"text": "x\u2028👍", "size": 1.5, "role": "admin"}).encode()
        answer = await both.call("POST", "/api/notes", data=raw, headers={"Content-Type": media})
        assert answer.body == {"got": {"text": "x\u2028👍", "size": 1.5, "tags": []}}


@pytest.mark.parametrize(
    "media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"]
)
async def test_another_content_type_is_refused(both: Api, media: str) -> None:
    answer = await both.call("POST", "/api/notes", data=b'{"text": "x"}', headers={"Content-Type": media})
    assert (answer.status, set(answer.body)) == (415, {"detail"})


async def test_a_compressed_body_is_refused(both: Api) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    answer = await both.call(
        "POST", "/api/notes", data=bomb, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
    )
    assert (answer.status, set(answer.body)) == (415, {"detail"})


async def raw_request(api: Api, *parts: bytes) -> bytes:
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.readuntil(b"}"), 20)
    finally:
        writer.close()


async def test_a_large_body_is_refused_before_anything_is_read_or_asked(both: Api) -> None:
    for path in (b"/api/notes", b"/api/connections", b"/api/auth/logout"):
        head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        answer = await raw_request(both, head + b"Content-Length: 104857600\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"1048576 bytes" in answer


async def test_a_body_of_an_unknown_caller_is_small(both: Api) -> None:
    for path in (b"/api/notes", b"/api/auth/login"):
        head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        answer = await raw_request(both, head + b"Content-Length: 65537\r\n\r\n")  # nothing of it is waited for
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"65536 bytes" in answer
    head = b"POST /api/connections HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = await raw_request(both, head + b"Content-Length: 65537\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")
    note = json.dumps({"text": "x"}).encode().ljust(65536)
    assert (await both.call("POST", "/api/notes", data=note, headers=AS_JSON)).status == 200


async def test_a_body_of_a_known_caller_may_have_a_mebibyte(world: World, both: Api) -> None:
    alice = await both.login("alice")
    wanted = json.dumps({"server_id": world.nodes["fra-1"], "protocol": "wireguard"}).encode()
    answer = await alice.call("POST", "/api/connections", data=wanted.ljust(1024 * 1024), headers=AS_JSON)
    assert answer.status == 201
    for deep in (b"[" * 1_000_000, b'{"a":' * 200_000, b'{"more": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"):
        assert (await alice.call("POST", "/api/connections", data=deep, headers=AS_JSON)).status == 400
    head = f"POST /api/connections HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice.token}\r\n".encode()
    head += b"Content-Type: application/json\r\nContent-Length: 1048577\r\n\r\n"
    assert (await raw_request(both, head)).startswith(b"HTTP/1.1 413 ")


async def test_a_large_body_of_unknown_length_is_refused(both: Api) -> None:
    alice = await both.login("alice")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    for path, chunks, limit in (("/api/notes", 2, b"65536 bytes"), ("/api/connections", 17, b"1048576 bytes")):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice.token}\r\n".encode()
        head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await raw_request(both, head, *[chunk] * chunks)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert limit in answer


async def test_a_slow_body_is_refused(both: Api) -> None:
    head = b"POST /api/notes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
    answer = await raw_request(both, head + b'{"te')
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_bytes_in_the_path_that_are_no_text(both: Api) -> None:
    answer = await raw_request(both, b"GET /api/servers/%ff%fe%00 HTTP/1.1\r\nHost: \xff\r\nUser-Agent: \xff\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ")
    login = json.dumps(OK_LOGIN).encode()
    head = b"POST /api/auth/login HTTP/1.1\r\nHost: x\r\nUser-Agent: \xff\xfe\r\nContent-Type: application/json\r\n"
    answer = await raw_request(both, head + f"Content-Length: {len(login)}\r\n\r\n".encode() + login)
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_an_unforeseen_error_is_told_without_details_and_logged_once(tiny: Tiny, both: Api) -> None:
    tiny.error = RuntimeError("the secret canary")
    with capture_logs() as logs:
        answer = await both.get("/api/fail")
    assert (answer.status, answer.body) == (500, {"detail": "internal server error"})
    [failed] = [entry for entry in logs if entry["event"] == "http.failed"]
    assert failed["exc_info"] is tiny.error
    assert failed["route"] == "/api/fail"


async def test_a_database_that_is_away_is_told_with_a_time_to_come_back(world: World, both: Api) -> None:
    alice = await both.login("alice")
    async with world.database.transaction() as tx:
        await (await tx.session.connection()).exec_driver_sql("ALTER TABLE connections RENAME TO away")
    answer = await alice.get("/api/connections")
    assert (answer.status, answer.body["code"]) == (503, 503)
    assert int(answer.headers["Retry-After"]) > 0


LIMITED = replace(SETTINGS, rate_limits={"skynet": RateLimit(5, 60, 3, 60), "tiny": RateLimit(2, 60, 0, 60)})


async def count_allowed(api: Api, path: str, **options: object) -> list[int]:
    return [(await api.get(path, **options)).status for _ in range(7)]


async def test_requests_are_limited_per_contract(world: World, tiny: Tiny) -> None:
    async with serve(world, world.skynet, tiny.contract(), settings=LIMITED) as api:
        assert await count_allowed(api, "/skynet/api/servers") == [401] * 5 + [429] * 2
        assert await count_allowed(api, "/tiny/api/servers") == [401] * 2 + [429] * 5
        refused = await api.get("/skynet/api/servers")
        assert set(refused.body) == {"error", "code"}
        assert 0 < int(refused.headers["Retry-After"]) <= 120


async def test_what_is_left_is_told_by_contracts_that_document_it(world: World, tiny: Tiny) -> None:
    async with serve(world, world.skynet, tiny.contract(), settings=LIMITED) as api:
        answer = await api.get("/tiny/api/fail")
        assert (answer.headers["X-RateLimit-Limit"], answer.headers["X-RateLimit-Remaining"]) == ("2", "1")
        assert int(answer.headers["X-RateLimit-Reset"]) > 1_600_000_000
        assert "X-RateLimit-Limit" not in (await api.get("/skynet/api/servers")).headers


async def test_logins_are_limited_more_strictly(world: World) -> None:
    async with serve(world, settings=LIMITED) as api:
        statuses = [(await api.post("/api/auth/login", OK_LOGIN)).status for _ in range(5)]
        assert statuses == [200] * 3 + [429] * 2


async def test_a_forged_address_changes_nothing(world: World) -> None:
    async with serve(world, settings=LIMITED) as api:
        statuses = [
            (await api.get("/api/servers", headers={"X-Forwarded-For": f"192.0.2.{n}"})).status for n in range(7)
        ]
        assert statuses == [401] * 5 + [429] * 2


async def test_behind_a_trusted_proxy_each_subscriber_is_counted_once(world: World) -> None:
    settings = replace(LIMITED, trusted_proxies=(ip_network("127.0.0.0/8"),))
    async with serve(world, settings=settings) as api:
        of_one = [
            (await api.get("/api/servers", headers={"X-Forwarded-For": f"6.6.6.{n}, 2001:db8:0:1::{n:x}"})).status
            for n in range(1, 8)
        ]
        assert of_one == [401] * 5 + [429] * 2
        other = await api.get("/api/servers", headers={"X-Forwarded-For": "2001:db8:0:2::1"})
        assert other.status == 401


async def test_requests_are_measured_by_route_not_by_path(both: Api) -> None:
    alice = await both.login("alice")
    for number in range(3):
        await alice.get(f"/api/servers/{number}")
    await both.get("/api/nothing/at/all")
    await both.call("PROPFIND", "/api/servers")
    samples = {
        tuple(sorted(sample.labels.items())): sample.value
        for metric in both.registry.collect()
        for sample in metric.samples
        if sample.name == "skynetvpn_http_request_seconds_count"
    }
    labels = {"contract": "skynet", "route": "/api/servers/{id}", "method": "GET", "status": "404"}
    assert samples[tuple(sorted(labels.items()))] == 3
    assert {dict(key)["route"] for key in samples} == {"/api/auth/login", "/api/servers/{id}", "none"}
    assert {dict(key)["method"] for key in samples} == {"POST", "GET", "other"}


async def test_one_log_line_a_request_and_no_secret_in_any(world: World) -> None:
    with capture_logs() as logs:
        async with serve(world) as api:
            alice = await api.login("alice")
            await alice.get("/api/servers?token=canary-query")
            await api.get("/api/servers", headers={"Authorization": "Bearer canary-token"})
            await api.post("/api/auth/login", {"username": "canary-name", "password": "canary-password"})
            await alice.call("PATCH", "/api/users/me", {"password": "canary-new-password"})
            await alice.call("PATCH", "/api/users/me", {"password": 7, "current_password": "canary-current"})
    requests = api.access_log()  # whole, now that the API has ended
    assert [(entry["method"], entry["route"], entry["status"]) for entry in requests] == [
        ("POST", "/api/auth/login", 200),
        ("GET", "/api/servers", 200),
        ("GET", "/api/servers", 401),
        ("POST", "/api/auth/login", 401),
        ("PATCH", "/api/users/me", 200),
        ("PATCH", "/api/users/me", 400),
    ]
    assert alice.token is not None
    for secret in (alice.token, PASSWORD, "canary"):
        assert secret not in str(logs) + str(requests)


def test_the_limit_for_logins_is_on_unless_it_is_turned_off() -> None:
    assert RateLimit().auth_requests > 0


FIELDS = ("contract", "method", "path", "route", "status", "ms", "client", "user_id")
FIELDS_OF_ALL = ("event", "request_id", "level", "timestamp")


async def test_a_log_line_has_the_form_of_the_others(world: World) -> None:
    async with serve(world) as api:
        alice = await api.login("alice")
        before = datetime.now(UTC)
        await alice.get("/api/servers/%ff?token=x", headers={"X-Request-ID": "abc-126"})
    line = api.access_log()[-1]
    assert tuple(line) == FIELDS + FIELDS_OF_ALL
    assert (line["event"], line["level"], line["request_id"]) == ("http.request", "info", "abc-126")
    assert (line["contract"], line["route"], line["path"]) == ("skynet", "none", "/api/servers/%FF")
    assert 0 < line["ms"] < 20_000
    assert before <= datetime.fromisoformat(line["timestamp"]) <= datetime.now(UTC)
    assert line["timestamp"].endswith("Z")


class Output(io.BytesIO):
    def __init__(self) -> None:
        super().__init__()
        self.flushed = asyncio.Event()

    def flush(self) -> None:
        self.flushed.set()


async def test_log_lines_are_written_soon_and_at_once_when_there_are_many() -> None:
    output = Output()
    access_log = AccessLog(output)
    access_log.add({"event": "first"})
    assert not output.getvalue()
    await asyncio.wait_for(output.flushed.wait(), 20)
    for number in range(1000):
        access_log.add({"event": "many", "number": number, "text": "x" * 100})
    assert output.tell() > 64 * 1024
    access_log.flush()
    assert [orjson.loads(line).get("number") for line in output.getvalue().splitlines()] == [None, *range(1000)]
    silent = AccessLog(output, enabled=False)
    silent.add({"event": "of no interest"})
    silent.flush()
    assert b"of no interest" not in output.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"GET /api/servers/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"F@@ /api/servers HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /api/servers HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n",
        b"hello\r\n\r\n",
        b"POST /api/auth/login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
)
async def test_what_is_no_http_is_told_so_in_an_envelope_and_nobody_else(
    world: World, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with capture_logs() as logs:
        async with serve(world) as api:
            answer = await raw_request(api, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 400 ")
    assert json.loads(body) == {"error": "this is not a request of HTTP/1.1", "code": 400}
    assert b"\r\nX-Request-ID: " in head
    assert (logs, caplog.records, api.access_log()) == ([], [], [])


async def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_error_of_ours(world: World, tiny: Tiny) -> None:
    head = b"POST /tiny/api/notes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with capture_logs() as logs:
        async with serve(world, tiny.contract()) as api:
            for rest in (b"Content-Length: 20\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
                host, port = api.url.removeprefix("http://").split(":")
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(head + rest)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
            await api.get("/api/fail")
    assert logs == []
    assert sorted(line["status"] for line in api.access_log()) == [200, 400, 400]


async def test_the_operators_paths_go_before_the_contracts(world: World) -> None:
    async def healthz(_request: web.BaseRequest) -> web.Response:
        return web.Response(text="well")

    async with serve(world, operations={"/healthz": healthz}) as api:
        assert (await api.get("/healthz")).raw == b"well"
        assert (await api.call("HEAD", "/healthz")).status == 200
        assert (await api.post("/healthz")).body == {"error": "there is nothing at this path", "code": 404}
    assert [line["method"] for line in api.access_log()] == ["POST"]
