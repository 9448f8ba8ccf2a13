"""The controller as a process, while strangers do to its ports what strangers do."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from controller import app
from tests.support.netns import wait_until

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0
PASSWORD = "correct horse battery"
MEGABYTE = 1 << 20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Running:
    process: subprocess.Popen[bytes]
    port: int
    node_port: int
    log: Path

    def ask(self, data: bytes, *, tls: bool = False) -> bytes:
        """Send it, and read until the controller has closed the connection."""
        with socket.create_connection(("127.0.0.1", self.node_port if tls else self.port), timeout=PATIENCE) as plain:
            connection: socket.socket = _untrusting().wrap_socket(plain) if tls else plain
            connection.sendall(data)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            return answer

    def request(self, method: str, path: str, body: bytes = b"", *headers: str, tls: bool = False) -> bytes:
        head = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}", *headers]
        return self.ask("\r\n".join(head).encode() + b"\r\n\r\n" + body, tls=tls)

    def login(self) -> bytes:
        body = json.dumps({"username": "alice", "password": PASSWORD}).encode()
        return self.request("POST", "/api/auth/login", body, "Content-Type: application/json")

    def ready(self) -> bool:
        try:
            return b" 200 " in self.request("GET", "/readyz")
        except OSError:
            return False

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident(self) -> int:
        """Bytes of memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the log; each is one JSON object."""
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]


def _untrusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def command(*arguments: str, stdin: str = "") -> None:
    subprocess.run(
        [sys.executable, "-m", "controller", *arguments],
        cwd=ROOT,
        input=stdin,
        text=True,
        check=True,
        timeout=60,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("controller") / "home"
    command("init", "--dir", str(directory), "--listen", "127.0.0.1:0", "--node-listen", "127.0.0.1:0")
    config = ("--config", str(directory / "controller.yaml"))
    command("user", "add", "alice", "--email", "alice@example.com", "--password-stdin", *config, stdin=PASSWORD)
    return directory


@contextmanager
def running(home: Path, log: Path, *, descriptors: int | None = None) -> Iterator[Running]:
    port, node_port = free_port(), free_port()
    addresses = {"SKYNETVPN_LISTEN": f"127.0.0.1:{port}", "SKYNETVPN_NODE_LISTEN": f"127.0.0.1:{node_port}"}
    program = [sys.executable, "-m", "controller", "run", "--config", str(home / "controller.yaml")]
    if descriptors is not None:
        program = ["prlimit", f"--nofile={descriptors}", *program]
    with log.open("wb") as file:
        process = subprocess.Popen(program, cwd=ROOT, env=os.environ | addresses, stderr=file)
    try:
        made = Running(process, port, node_port, log)
        wait_until(made.ready, PATIENCE)
        yield made
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def controller(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(home, tmp_path_factory.mktemp("log") / "log") as made:
        yield made


NO_HTTP = {
    "a line break in the log": b"GET http://[\x1b[2J{} HTTP/1.1\r\n\r\n",
    "asterisk": b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "length and chunks": b"POST /api/auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5c\r\n0\r\n\r\nGET /api/users/me HTTP/1.1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "length with a sign": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +4\r\n\r\nabcd",
    "space before the colon": b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
    "bare line feeds": b"GET /healthz HTTP/1.1\nHost: x\n\n",
    "NUL": b"GET / HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n",
    "1,000 headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    "a long path": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "another version": b"GET / HTTP/7.7\r\nHost: x\r\n\r\n",
    "TLS on the plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
}


@pytest.mark.parametrize("port", ["api", "nodes"])
@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP.keys())
def test_what_is_no_http_is_answered_once_and_does_not_fill_the_log(
    controller: Running, data: bytes, port: str
) -> None:
    before = len(controller.lines())
    answer = controller.ask(data, tls=port == "nodes")
    assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
    assert answer.count(b"HTTP/1.") == 1 + answer.partition(b"\r\n\r\n")[2].count(b"HTTP/1.")
    logged = controller.lines()[before:]
    assert len(logged) <= 1
    assert all(line["level"] == "info" for line in logged)


PATHS = [
    "//api/users/me",
    "/api//users/me",
    "/api/../api/users/me",
    "/api/./users/me",
    "/api/users/me/",
    "/api%2fusers/me",
    "/%61pi/users/me",
    "/api/users/me%00",
    "/api/users/me;a=b",
    "/skynet/skynet/api/users/me",
    "/prime/api/users/me",
    "//metrics",
    "/docs/../../../etc/passwd",
    "/docs/%2e%2e/%2e%2e/etc/passwd",
]


def test_a_path_has_one_spelling(controller: Running) -> None:
    token = json.loads(controller.login().partition(b"\r\n\r\n")[2])["token"]
    header = f"Authorization: Bearer {token}"
    assert controller.request("GET", "/api/users/me", b"", header).startswith(b"HTTP/1.1 200 ")
    for path in PATHS:
        assert controller.request("GET", path, b"", header).startswith(b"HTTP/1.1 404 "), path


def test_a_compressed_body_is_not_unpacked(controller: Running) -> None:
    bomb = gzip.compress(bytes(60 * MEGABYTE))
    assert len(bomb) < 65536  # a larger one is refused for its size
    headers = ("Content-Type: application/json", "Content-Encoding: gzip")
    before = controller.resident()
    for path in ("/api/auth/login", "/api/connections"):
        assert controller.request("POST", path, bomb, *headers)[:13] in (b"HTTP/1.1 415 ", b"HTTP/1.1 401 ")
    assert controller.resident() - before < 20 * MEGABYTE
    short = gzip.compress(bytes(50 * MEGABYTE))[:60_000]
    for body in (short, b"not gzip at all"):
        answer = controller.request("POST", "/node/v1/enrol", body, "Content-Encoding: gzip", tls=True)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"enrolment_malformed" in answer


def test_the_node_port_speaks_nothing_older_than_tls_1_3(controller: Running) -> None:
    context = _untrusting()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", controller.node_port), timeout=PATIENCE) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain)


def test_running_out_of_descriptors_is_survived(home: Path, tmp_path: Path) -> None:
    with running(home, tmp_path / "log", descriptors=64) as controller, ExitStack() as stack:
        at_rest = controller.descriptors()
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", controller.port), timeout=PATIENCE))
            for _ in range(150)
        ]
        wait_until(lambda: controller.descriptors() >= 64 or controller.process.poll() is not None, PATIENCE)
        assert controller.process.poll() is None
        for connection in held:
            connection.close()
        wait_until(controller.ready, PATIENCE)
        assert controller.login().startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: controller.descriptors() <= at_rest + 4, PATIENCE)


@pytest.mark.parametrize("begun", [b"", b"GET /x HTTP/1.1\r\nHost: x\r\nX: "], ids=["nothing", "half a head"])
async def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(app, "IDLE_TIMEOUT", 0.2)
    bound = socket.create_server(("127.0.0.1", 0))
    async with app._listening(web.Application(), bound, None):
        reader, writer = await asyncio.open_connection(*bound.getsockname())
        writer.write(begun)
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        writer.close()
