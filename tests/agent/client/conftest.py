"""A controller as the client meets it on the wire, and the client's command line against it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent.client.__main__ import main
from shared.keys import PrivateKey

PREFIX = "/skynet/api"
TOKEN = "a-token"
PASSWORD = "correct horse"


@dataclass
class FakeController:
    """Speaks the documented bodies. `answers` replaces an operation's answer, an event in `held` keeps it back;
    `requests` has what came in."""

    url: str = ""
    servers: list[dict[str, Any]] = field(default_factory=list)
    connections: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    conf: str = ""
    answers: dict[str, Callable[[], web.StreamResponse]] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any] | None]] = field(default_factory=list)

    def seen(self, operation: str) -> list[dict[str, Any] | None]:
        return [body for name, body in self.requests if name == operation]

    def app(self) -> web.Application:
        app = web.Application()
        routes: dict[str, Callable[[web.Request, Any], web.StreamResponse]] = {
            "POST /auth/login": self._login,
            "POST /auth/logout": lambda _request, _body: web.json_response({"message": "Logged out successfully"}),
            "GET /servers": lambda _request, _body: web.json_response([_without_load(item) for item in self.servers]),
            "GET /servers/{id}": lambda request, _body: _one(self.servers, "id", request),
            "GET /connections": lambda _request, _body: web.json_response(self.connections),
            "POST /connections": self._connect,
            "GET /connections/{id}": lambda request, _body: _one(self.connections, "connection_id", request),
            "GET /connections/{id}/config": self._config,
            "DELETE /connections/{id}": self._delete,
        }
        for operation, answer in routes.items():
            method, path = operation.split()
            app.router.add_route(method, PREFIX + path, self._handler(operation, answer))
        return app

    def _handler(
        self, operation: str, answer: Callable[[web.Request, Any], web.StreamResponse]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.json() if request.can_read_body else None
            self.requests.append((operation, body))
            if operation in self.held:
                await self.held[operation].wait()
            if operation in self.answers:
                return self.answers[operation]()
            if operation != "POST /auth/login" and request.headers.get("Authorization") != f"Bearer {TOKEN}":
                return error(401, "the token is not valid")
            return answer(request, body)

        return handle

    def _login(self, _request: web.Request, body: Any) -> web.StreamResponse:
        if body["password"] != PASSWORD:
            return error(401, "invalid credentials")
        return web.json_response({"token": TOKEN, "expires_at": "2026-12-01T00:00:00Z"})

    def _connect(self, _request: web.Request, body: Any) -> web.StreamResponse:
        connection = {
            "connection_id": f"c{len(self.connections) + 1}",
            "server_id": body["server_id"],
            "protocol": body["protocol"],
            "status": "connecting",
            "created_at": "2026-11-21T12:00:00Z",
        }
        self.connections.append(connection)
        return web.json_response(connection, status=201)

    def _config(self, request: web.Request, _body: Any) -> web.StreamResponse:
        if request.query["format"] == "json":
            return web.json_response(self.config)
        return web.Response(text=self.conf)

    def _delete(self, request: web.Request, _body: Any) -> web.StreamResponse:
        kept = [item for item in self.connections if item["connection_id"] != request.match_info["id"]]
        if len(kept) == len(self.connections):
            return error(404, "connection not found")
        self.connections = kept
        return web.json_response({"message": "Connection terminated"})


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Awaitable[Outcome]]


@pytest.fixture
async def controller() -> AsyncIterator[FakeController]:
    fake = FakeController()
    fake.config = {
        "addresses": ["10.66.0.2/32"],
        "dns": ["1.1.1.1"],
        "endpoint": "192.0.2.1:51820",
        "server_public_key": str(PrivateKey.generate().public()),
        "allowed_ips": ["0.0.0.0/0", "::/0"],
        "mtu": 1420,
        "keepalive": 25,
        "preshared_key": None,
        "private_key": None,
    }
    server = TestServer(fake.app())
    await server.start_server()
    fake.url = str(server.make_url("")).rstrip("/")
    yield fake
    await server.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SKYNETVPN_URL", raising=False)
    return tmp_path


@pytest.fixture
def cli(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process, on a thread of its own because it brings its own event loop."""

    async def run(*argv: str, stdin: str = "") -> Outcome:
        source = home / "stdin"
        source.write_text(stdin)
        with source.open() as file:
            monkeypatch.setattr("sys.stdin", file)
            status = await asyncio.to_thread(main, argv)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
async def logged_in(cli: Cli, controller: FakeController) -> Cli:
    outcome = await cli("login", "--url", controller.url, "--password-stdin", "alice", stdin=f"{PASSWORD}\n")
    assert outcome.status == 0, outcome.err
    controller.requests.clear()
    return cli


def server(id: str, **values: Any) -> dict[str, Any]:
    return {"id": id, "name": id, "country": "DE", "ip": "192.0.2.1", "status": "online", "load": 10} | values


def error(status: int, words: str) -> web.Response:
    return web.json_response({"error": words, "code": status}, status=status)


def _without_load(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "load"}


def _one(items: list[dict[str, Any]], key: str, request: web.Request) -> web.Response:
    found = [item for item in items if item[key] == request.match_info["id"]]
    return web.json_response(found[0]) if found else error(404, "not found")


def report(controller: FakeController) -> None:
    """From now on the controller says of every connection that its server has it."""

    def answer() -> web.StreamResponse:
        return web.json_response({**controller.connections[-1], "status": "connected"})

    controller.answers["GET /connections/{id}"] = answer


def in_arguments(*words: str) -> list[str]:
    """The command lines on this machine that have one of these words in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
            found += [line for word in words if word in line]
    return found


def readable_by_others(directory: Path) -> list[Path]:
    """Files with more in them than a process's number that others than the owner may open."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".pid"]
    return [path for path in files if path.stat().st_mode & 0o077]


def left_by_programs(home: Path) -> list[Path]:
    return [path for path in (home / "state").rglob("*") if path.is_file()]
