"""Which contract answers: the seven rules, with five contracts that share their paths as documented."""

from __future__ import annotations

import pytest

from controller.config import CONTRACTS
from controller.contracts.kit import Access, Call, Contract, Failure, Model, Reply, Route
from controller.contracts.kit.resolve import Resolver, settle


class Body(Model):
    pass


async def answer(call: Call) -> Reply:
    return Reply({"contract": call.contract})


def envelope(failure: Failure) -> dict[str, object]:
    return {"message": failure.message}


def build(name: str, base: str, joint: str, *paths: str) -> Contract:
    def route(text: str) -> Route:
        method, path = text.split(" ")
        access, known_by = (Access.PUBLIC, joint) if path == "/auth/login" else (Access.USER, None)
        return Route(
            method=method, path=path, access=access, handler=answer, summary="", answer=Body, joint=known_by, body=None
        )

    return Contract(
        name=name,
        title=name,
        description="",
        base=base,
        routes=tuple(route(text) for text in ("POST /auth/login", *paths)),
        envelope=envelope,
        error=Body,
    )


EVERYONE = [
    build("skynet", "/api", "username", "GET /servers", "GET /servers/{id}", "POST /connections", "GET /users/me"),
    build("skypanel", "/api", "email", "GET /servers", "GET /users/me", "PUT /users/me", "POST /servers/{id}/power"),
    build("prime", "/api/v1", "email", "GET /servers", "GET /users/{id}", "GET /users/me", "GET /connection/status"),
    build("cloudvps", "/api/v1", "email", "GET /vps", "GET /plans", "GET /support/tickets"),
    build("irssh", "/api", "username", "GET /users", "GET /protocols", "PUT /protocols/{name}"),
]
HOSTS = {"panel.example.com": "skypanel", "vps.example.com": "cloudvps"}
DEFAULTS = {"/api": "skynet", "/api/v1": "prime"}
RESOLVER = Resolver(EVERYONE, HOSTS, DEFAULTS)


def resolved(
    request: str, host: str = "", accept: str = "", token: str | None = None, fields: tuple[str, ...] = ()
) -> str:
    method, path = request.split(" ")
    chosen = settle(RESOLVER.choose(method, path, host, accept), token, fields)
    return "+".join(candidate.contract.name for candidate in chosen)


def test_all_five_names_are_covered() -> None:
    assert {contract.name for contract in EVERYONE} == set(CONTRACTS)


@pytest.mark.parametrize(
    ("request_line", "options", "expected"),
    [
        # 1. the prefix, whatever else is said
        ("GET /skynet/api/servers", {"host": "vps.example.com", "token": "prime"}, "skynet"),
        ("POST /skypanel/api/auth/login", {"fields": ("username",)}, "skypanel"),
        ("POST /prime/api/v1/auth/login", {"accept": "application/vnd.cloudvps.v1+json"}, "prime"),
        ("GET /cloudvps/api/v1/nothing", {}, "cloudvps"),
        ("GET /irssh/api/users", {}, "irssh"),
        # 2. the host
        ("GET /api/servers", {"host": "panel.example.com"}, "skypanel"),
        (
            "GET /api/servers",
            {"host": "PANEL.example.com:8080", "accept": "application/vnd.skynet.v1+json"},
            "skypanel",
        ),
        ("GET /api/servers", {"host": "other.example.com"}, "skynet"),
        ("GET /api/servers", {"host": "[2001:db8::1]:8080"}, "skynet"),
        # 3. the Accept header
        ("GET /api/servers", {"accept": "application/vnd.skypanel.v1+json", "token": "skynet"}, "skypanel"),
        ("GET /api/servers", {"accept": "text/html, application/vnd.skypanel.v1+json;q=0.9"}, "skypanel"),
        ("GET /api/servers", {"accept": "application/vnd.unknown.v1+json"}, "skynet"),
        # 4. what one contract alone documents
        ("POST /api/connections", {"token": "skypanel"}, "skynet"),
        ("PUT /api/users/me", {"token": "skynet"}, "skypanel"),
        ("GET /api/protocols", {}, "irssh"),
        ("PUT /api/protocols/wireguard", {}, "irssh"),
        ("GET /api/v1/vps", {}, "cloudvps"),
        ("HEAD /api/v1/plans", {}, "cloudvps"),
        ("GET /api/v1/connection/status", {}, "prime"),
        # 5. the token
        ("GET /api/servers", {"token": "skypanel"}, "skypanel"),
        ("GET /api/users/me", {"token": "skypanel"}, "skypanel"),
        ("GET /api/users/me", {"token": "cloudvps"}, "skynet"),
        ("GET /api/v1/nothing", {"token": "cloudvps"}, "cloudvps"),
        # 6. the body of a login; one that fits two contracts is answered by both
        ("POST /api/auth/login", {"fields": ("email", "password")}, "skypanel"),
        ("POST /api/auth/login", {"fields": ("username", "password")}, "skynet+irssh"),
        ("POST /api/auth/login", {"fields": ("username", "email")}, "skynet+irssh"),
        ("POST /api/v1/auth/login", {"fields": ("email", "password")}, "prime+cloudvps"),
        # 7. the default
        ("POST /api/auth/login", {"fields": ()}, "skynet"),
        ("GET /api/servers", {}, "skynet"),
        ("GET /api/nothing", {}, "skynet"),
        ("GET /api/v1/nothing", {}, "prime"),
        ("DELETE /api/servers", {}, "skynet"),
        ("GET /nothing", {}, "skynet"),
        ("GET /", {}, "skynet"),
        ("GET /skynet", {}, "skynet"),
    ],
)
def test_the_rules_in_their_order(request_line: str, options: dict[str, object], expected: str) -> None:
    assert resolved(request_line, **options) == expected  # type: ignore[arg-type]


def test_the_defaults_can_be_configured() -> None:
    resolver = Resolver(EVERYONE, {}, {"/api": "irssh", "/api/v1": "cloudvps"})
    for path, name in (("/api/nothing", "irssh"), ("/api/v1/nothing", "cloudvps")):
        assert settle(resolver.choose("GET", path, "", ""), None, ())[0].contract.name == name
    chosen = settle(resolver.choose("POST", "/api/auth/login", "", ""), None, ("username",))
    assert [candidate.contract.name for candidate in chosen] == ["irssh", "skynet"]


@pytest.mark.parametrize(
    ("path", "accept", "served"),
    [
        ("/api/servers", "application/vnd.skypanel.v1+json", True),
        ("/api/servers", "application/vnd.skypanel.v2+json", False),
        ("/skypanel/api/servers", "application/vnd.skypanel.v2+json", False),
        ("/skypanel/api/servers", "application/vnd.skypanel.v2+json, application/vnd.skypanel.v1+json", True),
        ("/skypanel/api/servers", "application/vnd.skypanel.v2+json, */*;q=0.1", True),
        ("/skypanel/api/servers", "application/vnd.prime.v2+json", True),
    ],
)
def test_a_version_that_is_not_served(path: str, accept: str, served: bool) -> None:
    [candidate] = RESOLVER.choose("GET", path, "", accept)
    assert (candidate.contract.name, candidate.served) == ("skypanel", served)


def test_a_written_segment_goes_before_a_parameter() -> None:
    [me] = RESOLVER.choose("GET", "/prime/api/v1/users/me", "", "")
    [other] = RESOLVER.choose("GET", "/prime/api/v1/users/7", "", "")
    assert me.route is not None
    assert other.route is not None
    assert (me.route.path, me.params) == ("/users/me", {})
    assert (other.route.path, other.params) == ("/users/{id}", {"id": "7"})


@pytest.mark.parametrize("segment", ["", "a%00", "a%2fb", "a%0a", "..%2f", "x" * 129, "é", "a b", "'--", "a;b"])
def test_what_cannot_be_an_identifier_is_no_path(segment: str) -> None:
    [candidate] = RESOLVER.choose("GET", f"/prime/api/v1/users/{segment}", "", "")
    assert candidate.route is None
    assert not candidate.allowed


def test_a_path_with_other_methods_names_them() -> None:
    [candidate] = RESOLVER.choose("DELETE", "/skynet/api/connections", "", "")
    assert candidate.allowed == {"POST"}
