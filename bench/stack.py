"""A whole installation for a row: a real controller and a real agent, each in a network namespace, gone afterwards.

controller 192.0.2.1 ─── 192.0.2.2 node
(its API on loopback)
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
import yaml

from bench import material
from controller.accounts.tables import UserRow
from controller.config import read_config, read_secrets
from controller.desired import service as desired
from controller.fleet.tables import NodeRow
from controller.store.database import open_database
from controller.store.types import new_id
from controller.tunnels.tables import AllocationRow, ConnectionRow
from shared.desired import Peer
from tests.support.host import Host
from tests.support.netns import Running, wait_until

CONTROLLER, NODE = "192.0.2.1", "192.0.2.2"
API_PORT = 8080
INTERFACE = "sky0"
_PATIENCE = 120.0  # seconds; the machine may be busy
_SAMPLE = re.compile(r"^(\w+) ([0-9.e+-]+)$", re.MULTILINE)


class Stack:
    """`peers` are on the node when `start` returns. `core` pins the controller, the agent may use all others.

    `python` is the interpreter of the agent.
    """

    def __init__(self, *, peers: int = 0, core: int | None = None, python: str = sys.executable) -> None:
        self._exit = ExitStack()
        self._core = core
        self._agent = ("env", f"PYTHONPATH={Path(__file__).parent.parent}", python, "-m", "agent")
        self.count = peers
        self.agent: Running | None = None

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.show_logs()
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.show_logs()
        self._exit.close()

    def _make(self) -> None:
        self.directory = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="skynetvpn-bench-")))
        self.controller, self.node = (self._exit.enter_context(Host(name)) for name in ("ctl", "node"))
        self.controller.namespace.connect(self.node.namespace, f"{CONTROLLER}/24", f"{NODE}/24")
        listen = ("--listen", f"127.0.0.1:{API_PORT}", "--node-listen", f"{CONTROLLER}:8443")
        self.controller.run(sys.executable, "-m", "controller", "init", "--dir", str(self._home), *listen)
        self._settle()
        self.password = secrets.token_urlsafe(16)
        for name in ("crowd", "alice"):
            self._command(
                *("user", "add", name, "--email", f"{name}@example.org", "--plan", "enterprise", "--password-stdin"),
                stdin=f"{self.password}\n",
            )
        joining = ("node", "token", "--name", "fra1", "--country", "DE", "--city", "Frankfurt", "--endpoint", NODE)
        token = self._command(*joining, "--minutes", "60")
        asyncio.run(self._seed())
        self.start_controller()
        self.node.run(*self._agent, "enroll", "--token", "-", "--dir", str(self.agent_directory), stdin=token)
        self.start_agent()
        self.wait_applied()
        self.token = self._login()
        (server,) = self.call("GET", "/api/servers")
        self.server_id = server["id"]

    @property
    def agent_directory(self) -> Path:
        return self.directory / "agent"

    @property
    def _home(self) -> Path:
        return self.directory / "controller"

    @property
    def _settings(self) -> str:
        return str(self._home / "controller.yaml")

    def _settle(self) -> None:
        """The limits stay in the path, but are out of reach of what a benchmark asks for."""
        path = Path(self._settings)
        settings = yaml.safe_load(path.read_text())
        many = 1_000_000_000
        settings["rate_limits"] = {"skynet": {"requests": many, "auth_requests": 1000}}
        settings["plans"] = {"enterprise": {"max_connections": 100_000}}
        path.write_text(yaml.safe_dump(settings))

    def _command(self, *argv: str, stdin: str | None = None) -> str:
        return self.controller.run(
            sys.executable, "-m", "controller", *argv, "--config", self._settings, stdin=stdin, timeout=_PATIENCE
        )

    async def _seed(self) -> None:
        """Connections of `crowd` as its clients would have made them; 10,000 requests would take minutes."""
        config = read_config(Path(self._settings), {})
        database = open_database(config.database_url, read_secrets(config.secret_key_file))
        try:
            async with database.transaction() as tx:
                node_id = await tx.session.scalar(sa.select(NodeRow.id))
                user_id = await tx.session.scalar(sa.select(UserRow.id).where(UserRow.username == "crowd"))
                assert node_id is not None and user_id is not None
                peers = material.peers(self.count)
                rows = [_connection(peer, user_id, node_id) for peer in peers]
                tx.session.add_all(rows)
                await tx.session.flush()
                tx.session.add_all(
                    AllocationRow(node_id=node_id, slot=slot, connection_id=row.id, released_at=None)
                    for slot, row in enumerate(rows, material.FIRST_SLOT)
                )
                await desired.put(tx, desired.node_scope(node_id), peers)
        finally:
            await database.close()

    def start_controller(self) -> None:
        argv = (sys.executable, "-m", "controller", "run", "--config", self._settings)
        pinned = ("taskset", "-c", str(self._core)) if self._core is not None else ()
        self.service = self.controller.start(self.directory / "controller.log", *pinned, *argv)
        wait_until(self._ready, _PATIENCE)

    def restart_controller(self) -> None:
        self.controller.namespace.end(self.service)
        self.start_controller()

    def start_agent(self) -> None:
        argv = (*self._agent, "run", "--config", str(self.agent_directory / "agent.yaml"))
        self.agent = self.node.start(self.directory / "agent.log", *argv)

    def stop_agent(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.agent is not None
        self.agent.send_signal(number)
        self.agent.wait(_PATIENCE)

    def wait_applied(self) -> None:
        """Until the interface has every peer, and the controller knows that the node is there."""

        def there() -> bool:
            assert self.agent is not None
            if self.agent.poll() is not None:
                raise RuntimeError("the agent ended")
            return self.peers_on_host() >= self.count and self.online()

        wait_until(there, _PATIENCE)

    def online(self) -> bool:
        return 'skynetvpn_node_up{node="fra1"} 1.0' in self.metrics_text()

    def agent_connected(self) -> bool:
        """In the agent's own words."""
        told = self.node.namespace.run("curl", "-s", "http://127.0.0.1:9586/metrics", check=False)
        return "\nskynetvpn_agent_connected 1\n" in told

    def peers_on_host(self) -> int:
        try:
            return len(self.node.run("wg", "show", INTERFACE, "peers").split())
        except AssertionError:  # not there yet
            return -1

    def metrics_text(self) -> str:
        return self._request("GET", "/metrics")[1].decode()

    def metrics(self) -> dict[str, float]:
        """Samples without labels."""
        return {name: float(value) for name, value in _SAMPLE.findall(self.metrics_text())}

    def call(self, method: str, path: str, body: object = None) -> Any:
        status, answer = self._request(method, path, body)
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status}: {answer.decode(errors='replace')}")
        return json.loads(answer)

    def connect(self, public_key: str, *, wait: bool = True) -> str:
        wanted = {"server_id": self.server_id, "protocol": "wireguard", "public_key": public_key}
        query = "?wait=applied" if wait else ""
        return str(self.call("POST", f"/api/connections{query}", wanted)["connection_id"])

    def disconnect(self, connection_id: str, *, wait: bool = True) -> None:
        self.call("DELETE", f"/api/connections/{connection_id}{'?wait=applied' if wait else ''}")

    def _login(self) -> str:
        answer = self.call("POST", "/api/auth/login", {"username": "alice", "password": self.password})
        return str(answer["token"])

    def _ready(self) -> bool:
        if self.service.poll() is not None:
            raise RuntimeError("the controller ended")
        try:
            return self._request("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def _request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self.token}"} if hasattr(self, "token") else {}
        payload = json.dumps(body).encode() if body is not None else None
        if payload is not None:
            headers["Content-Type"] = "application/json"
        with self.controller.namespace.entered():
            connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=30)
            try:
                connection.request(method, path, payload, headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            finally:
                connection.close()

    def show_logs(self) -> None:
        for log in sorted(self.directory.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-15:]
            print(f"--- {log.name}", *lines, sep="\n", file=sys.stderr)


def _connection(peer: Peer, user_id: str, node_id: str) -> ConnectionRow:
    return ConnectionRow(
        id=new_id(),
        user_id=user_id,
        node_id=node_id,
        contract="skynet",
        protocol="wireguard",
        device_id=None,
        created_at=datetime.now(UTC),
        ended_at=None,
        end_reason=None,
        public_key=peer.public_key,
        sealed_private_key=None,
        sealed_preshared_key=None,
        generation=None,
        last_rx=0,
        last_tx=0,
        last_handshake=0,
        rx=0,
        tx=0,
        handshake_at=None,
    )


def resident_kib(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


def pin(pids: Sequence[int], core: int) -> None:
    for pid in pids:
        os.sched_setaffinity(pid, {core})


def settle(seconds: float) -> None:
    """Let what runs come to rest, where the row is about a state and nothing tells of it."""
    time.sleep(seconds)
