"""A whole installation with real processes: a controller, a node, a client and the internet; gone afterwards.

client 192.0.2.2 ─── 192.0.2.1 node 198.51.100.2 ─── 198.51.100.1 internet
                     203.0.113.2 │
                     203.0.113.1 controller (its API on loopback)
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from shared.keys import PrivateKey
from tests.fleet.tunnel import Tunnel
from tests.support.host import Host
from tests.support.netns import Namespace, Running, unique, wait_until

CLIENT, NODE = "192.0.2.2", "192.0.2.1"
NODE_OUTSIDE, INTERNET = "198.51.100.2", "198.51.100.1"
NODE_INSIDE, CONTROLLER = "203.0.113.2", "203.0.113.1"
INTERFACE = "sky0"
IN_GUEST = os.environ.get("SKYNETVPN_KERNEL_TESTS") == "1"
PATIENCE = 30.0 * int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))  # seconds; other work may keep the machine busy
_API_PORT = 8080
_MANY = 1_000_000_000


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection with the key that its client made."""

    id: str
    private_key: PrivateKey

    @property
    def public_key(self) -> str:
        return str(self.private_key.public())


@dataclass(frozen=True, slots=True)
class Template:
    """The directories of a controller and of an agent that has enrolled there: made once, copied by every module."""

    directory: Path
    password: str
    join_token: str


def make_template(directory: Path) -> Template:
    with Host("ctl") as controller, Host("node") as node:
        controller.namespace.connect(node.namespace, f"{CONTROLLER}/24", f"{NODE_INSIDE}/24")
        template, service = install(controller, node, directory)
        controller.namespace.end(service)
    return template


def install(controller: Host, node: Host, directory: Path, **settings: object) -> tuple[Template, Running]:
    """By the command lines, as an operator does it; the controller, which has these settings, runs on."""
    password = secrets.token_urlsafe(16)
    program, home = script("skynetvpn-controller"), directory / "controller"
    listen = ("--listen", f"127.0.0.1:{_API_PORT}", "--node-listen", f"{CONTROLLER}:8443")
    controller.run(program, "init", "--dir", str(home), *listen)
    file = home / "controller.yaml"
    limits = {"rate_limits": {"skynet": {"requests": _MANY, "auth_requests": _MANY}}}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | limits | settings))
    config = ("--config", str(file))
    service = controller.start(directory / "controller.log", program, "run", *config)
    user = ("--email", "alice@example.org", "--plan", "enterprise", "--password-stdin")
    controller.run(program, "user", "add", "alice", *user, *config, stdin=f"{password}\n")
    place = ("--name", "fra1", "--country", "DE", "--city", "Frankfurt", "--endpoint", NODE)
    token = controller.run(program, "node", "token", *place, *config).strip()
    wait_until(lambda: "controller.ready" in (directory / "controller.log").read_text(), PATIENCE)
    node.run(script("skynetvpn-agent"), "enroll", "--token", "-", "--dir", str(directory / "agent"), stdin=token)
    return Template(directory, password, token), service


@dataclass(slots=True)
class Installation:
    """Everything that is started inside is ended with `stack`."""

    template: Template
    directory: Path
    stack: ExitStack
    hosts: type[Host] = Host
    controller: Host = field(init=False)
    node: Host = field(init=False)
    client: Host = field(init=False)
    internet: Namespace = field(init=False)
    home: Path = field(init=False)  # of the controller, as it sees it
    agent_home: Path = field(init=False)
    service: Running | None = None
    agent: Running | None = None
    token: str = ""
    server_id: str = ""

    def __post_init__(self) -> None:
        self.controller = self.stack.enter_context(self.hosts("ctl"))
        self.client = self.stack.enter_context(self.hosts("client"))
        self.internet = self.stack.enter_context(Namespace("inet"))
        self.home, self.agent_home = self.directory / "controller", self.directory / "agent"
        self.plug_in_node()

    def copy_template(self) -> None:
        """Take the directories over; before it something may be mounted at their places."""
        for name, host, home in (("controller", self.controller, self.home), ("agent", self.node, self.agent_home)):
            shutil.copytree(self.template.directory / name, self._seen(host, home), dirs_exist_ok=True)

    def begin(self) -> None:
        """Start both services and log in."""
        self.start_controller()
        self.start_agent()
        self.log_in()
        self.wait_online()

    # --- hosts ---

    def plug_in_node(self) -> None:
        """A freshly booted host: no interface, no rule, no process; the cables of the one before are gone with it."""
        self.node = self.stack.enter_context(self.hosts("node"))
        # An /etc of its own, because SSH makes system accounts there. It is on the host's disk: a reboot keeps it.
        if not IN_GUEST:  # what is written there is lost in any case
            etc = self.directory / "etc"
            if not etc.exists():
                shutil.copytree("/etc", etc, symlinks=True)
                etc.chmod(0o755)
            self.node.run("mount", "--bind", str(etc), "/etc")
        self.client.namespace.connect(self.node.namespace, f"{CLIENT}/24", f"{NODE}/24")
        self.node.namespace.connect(self.internet, f"{NODE_OUTSIDE}/24", f"{INTERNET}/24")
        self.controller.namespace.connect(self.node.namespace, f"{CONTROLLER}/24", f"{NODE_INSIDE}/24")

    def reboot_node(self) -> None:
        """Everything on the host ends at once, and only its disk remains."""
        for pid in self.node.namespace.pids():
            subprocess.run(("kill", "-9", str(pid)), check=False, capture_output=True)
        self.node.namespace.close()
        self.agent = None
        self.plug_in_node()

    def small_disk(self, host: Host, path: Path, size: str) -> None:
        path.mkdir()
        host.run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path))

    @contextmanager
    def full_disk(self, host: Host, path: Path) -> Iterator[None]:
        """While inside, nothing more fits on the file system of the directory."""
        filler = self._seen(host, path) / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        try:
            yield
        finally:
            filler.unlink()

    @staticmethod
    def _seen(host: Host, path: Path) -> Path:
        return host.root / path.relative_to("/")

    # --- services ---

    @property
    def controller_log(self) -> Path:
        return self.directory / "controller.log"

    @property
    def agent_log(self) -> Path:
        return self.directory / "agent.log"

    def start_controller(self) -> None:
        self.service = self.controller.start(
            self.controller_log, script("skynetvpn-controller"), "run", "--config", self.settings
        )
        wait_until(self._ready, PATIENCE)

    def stop_controller(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.service is not None
        self.service.send_signal(number)
        self.service.wait(PATIENCE)

    def start_agent(self, *, prefix: tuple[str, ...] = (), **environ: str) -> None:
        quick = {"POLL_SECONDS": "0.5", "RECHECK_SECONDS": "2", "DIRECTORY": str(self.agent_home)} | environ
        env = {f"SKYNETVPN_AGENT_{name}": value for name, value in quick.items()}
        run = (script("skynetvpn-agent"), "run", "--config", str(self.agent_home / "agent.yaml"))
        self.agent = self.node.start(self.agent_log, *prefix, *run, env=env)

    def stop_agent(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.agent is not None
        self.agent.send_signal(number)
        self.agent.wait(PATIENCE)

    @property
    def settings(self) -> str:
        return str(self.home / "controller.yaml")

    def command(self, *argv: str, stdin: str | None = None) -> str:
        """The controller's command line beside the running controller."""
        return self.controller.run(script("skynetvpn-controller"), *argv, "--config", self.settings, stdin=stdin)

    def wait_online(self) -> None:
        self.wait(lambda: self.metric("skynetvpn_node_up", node="fra1") == 1, "the node does not come online")
        self.wait(lambda: self._server()["status"] == "online", "the API does not show the node as online")
        self.server_id = self._server()["id"]

    def wait(self, condition: Any, otherwise: str, timeout: float = PATIENCE) -> float:
        """Return how many seconds it took."""
        began = time.monotonic()
        try:
            wait_until(condition, timeout)
        except TimeoutError as error:
            raise AssertionError(f"{otherwise} within {timeout:g} s\n{self.logs()}") from error
        return time.monotonic() - began

    def logs(self, lines: int = 25) -> str:
        """The ends of both logs, for messages."""
        found = []
        for path in (self.controller_log, self.agent_log):
            text = path.read_text(errors="replace").splitlines() if path.exists() else []
            found += [f"--- {path.name}", *(line for line in text if "http.request" not in line)][-lines:]
        return "\n".join(found)

    # --- the public API ---

    def call(self, method: str, path: str, body: object = None) -> Answer:
        """Raises OSError or HTTPException where the controller does not answer."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        payload = None if body is None else json.dumps(body).encode()
        if payload is not None:
            headers["Content-Type"] = "application/json"
        link = http.client.HTTPConnection("127.0.0.1", _API_PORT, timeout=PATIENCE)
        try:
            with self.controller.namespace.entered():
                link.connect()
            link.request(method, path, payload, headers)
            answer = link.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            link.close()

    def log_in(self) -> None:
        answer = self.call("POST", "/api/auth/login", {"username": "alice", "password": self.template.password})
        assert answer.status == 200, answer.body
        self.token = answer.json["token"]

    def connect(self, *, applied: bool = True) -> Connected:
        """A connection with a key of the client's own, on the node when this returns."""
        key = PrivateKey.generate()
        answer = self.post_connection(key)
        assert answer.status == 201, answer.body
        assert not applied or answer.headers["X-Applied"] == "true", self.logs()
        return Connected(answer.json["connection_id"], key)

    def post_connection(self, key: PrivateKey | None, query: str = "?wait=applied") -> Answer:
        wanted = {"server_id": self.server_id, "protocol": "wireguard"}
        own = {"public_key": str(key.public())} if key is not None else {}
        return self.call("POST", f"/api/connections{query}", wanted | own)

    def delete_connection(self, connection_id: str) -> Answer:
        return self.call("DELETE", f"/api/connections/{connection_id}?wait=applied")

    def live(self) -> dict[str, dict[str, Any]]:
        answer = self.call("GET", "/api/connections")
        assert answer.status == 200, answer.body
        rows = answer.json
        found = {row["connection_id"]: row for row in rows}
        assert len(found) == len(rows), "a connection is listed twice"
        return found

    def config(self, connected: Connected) -> str:
        """The client's wg-quick file, with its own private key written in."""
        answer = self.call("GET", f"/api/connections/{connected.id}/config?format=conf")
        assert answer.status == 200, answer.body
        own = f"PrivateKey = {connected.private_key.reveal()}"
        return re.sub(r"^# PrivateKey = .*$", own, answer.body.decode(), flags=re.MULTILINE)

    @contextmanager
    def tunnel(self, connected: Connected) -> Iterator[Tunnel]:
        """A client's tunnel through which packets pass."""
        with Tunnel(self.client, self.directory / f"{unique('wgc')}.conf", self.config(connected)) as tunnel:
            self.wait(lambda: tunnel.reaches(INTERNET), "the client does not reach the internet")
            yield tunnel

    # --- what is known outside of the API ---

    def peers(self) -> dict[str, frozenset[str]]:
        """The node's peers by public key, with their allowed IPs."""
        found: dict[str, frozenset[str]] = {}
        for line in self.node.run("wg", "show", INTERFACE, "allowed-ips", check=False).splitlines():
            key, _, addresses = line.partition("\t")
            assert key not in found, "a peer is there twice"
            found[key] = frozenset(addresses.split())
        return found

    def stored(self, query: str, *parameters: object) -> Any:
        """The one row of a query on the controller's database."""
        path = f"file:{self.home / 'controller.db'}?mode=ro"
        with closing(sqlite3.connect(path, uri=True, timeout=PATIENCE)) as database:
            (row,) = database.execute(query, parameters).fetchall()
        return row

    def nodes(self) -> str:
        return self.command("node", "list")

    def wait_told(self, words: str, *, now: bool = True) -> None:
        """Until the operator is told of it, or no longer; a command for each look would take long."""

        def told() -> bool:
            (problems,) = self.stored("SELECT coalesce(group_concat(problem), '') FROM applied")
            return (words in problems) == now

        self.wait(told, f"the operator is {'not' if now else 'still'} told {words!r}")
        assert (words in self.nodes()) == now

    def metric(self, name: str, **labels: str) -> float:
        """One of the controller's samples; 0 where it has none."""
        return _sample(self.call("GET", "/metrics").body.decode(), name, labels)

    def agent_metric(self, name: str, **labels: str) -> float:
        told = self.node.run("curl", "-s", "http://127.0.0.1:9586/metrics", check=False)
        return _sample(told, name, labels)

    def _server(self) -> Any:
        answer = self.call("GET", "/api/servers")
        assert answer.status == 200, answer.body
        (server,) = answer.json
        return server

    def _ready(self) -> bool:
        assert self.service is not None and self.service.poll() is None, self.logs()
        try:
            return self.call("GET", "/readyz").status == 200
        except OSError:
            return False


def _sample(text: str, name: str, labels: dict[str, str]) -> float:
    pairs = ",".join(f'{key}="{value}"' for key, value in labels.items())
    series = f"{name}{{{pairs}}}" if pairs else name
    for line in text.splitlines():
        if line.startswith(f"{series} "):
            return float(line.rpartition(" ")[2])
    return 0.0
