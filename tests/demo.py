"""The whole main job once, with real parts, in network namespaces that are gone afterwards (`make demo`).

       client 192.0.2.2 ─── 192.0.2.1 node 198.51.100.2 ─── 198.51.100.1 internet
                            203.0.113.2 │
                            203.0.113.1 controller

The internet has no way back to the tunnel's addresses: an answer proves that the node translates them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

from tests.support.host import Host
from tests.support.netns import CommandFailed, Namespace, unique, wait_until

INTERNET, NODE_OUTSIDE = "198.51.100.1", "198.51.100.2"
NODE, CLIENT = "192.0.2.1", "192.0.2.2"
CONTROLLER, NODE_INSIDE = "203.0.113.1", "203.0.113.2"
API = "http://127.0.0.1:8080"
BODY = secrets.token_bytes(1 << 20)
PROGRAMS = ("curl", "ip", "nft", "openvpn", "ping", "ssh", "sshd", "wg", "wireguard-go")
PROTOCOLS = ("openvpn", "ssh", "wireguard")
PROXY = "127.0.0.1:1080"
LAST_LINES = 15


class Failed(Exception):
    """What the demo shows does not hold."""


class Steps:
    """Prints each step with its time; the detail is what was seen."""

    def __init__(self) -> None:
        self.detail = ""

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        began, self.detail = time.monotonic(), ""
        try:
            yield
        except BaseException:
            self._print("✗", title, began)
            raise
        self._print("✓", title, began)

    def _print(self, mark: str, title: str, began: float) -> None:
        detail = f"  {self.detail}" if self.detail else ""
        print(f"{mark} {time.monotonic() - began:5.2f} s  {title:<34}{detail}".rstrip(), flush=True)


class Internet(BaseHTTPRequestHandler):
    """Answers with a body, and with the address that the request came from."""

    def do_GET(self) -> None:  # the base class looks for this name
        self.send_response(200)
        self.send_header("X-Peer", self.client_address[0])
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *args: Any) -> None:
        return


class Demo:
    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.steps = Steps()
        self.directory = directory
        self.controller = stack.enter_context(Namespace("ctl"))
        self.host = stack.enter_context(Host("node"))
        self.node = self.host.namespace
        self.client = stack.enter_context(Namespace("client"))
        self.internet = stack.enter_context(Namespace("inet"))
        self.interface = unique("dem")
        self.connection_id = self.token = ""
        self._stack = stack

    def run(self) -> None:
        step = self.steps.step
        with step("lay the cables"):
            self.lay_cables()
        with step("make a controller"):
            self.controller_command("init", "--dir", str(self.directory / "controller"), *self.listen())
        with step("start the controller"):
            self.start(self.controller, "controller", "skynetvpn-controller", "run", "--config", self.settings)
            self.wait(lambda: self.ready(), "the controller is not ready")
        password = secrets.token_urlsafe(16)
        with step("add a user and an administrator"):
            for name, role in (("alice", "user"), ("boss", "admin")):
                options = ("--email", f"{name}@example.org", "--role", role, "--plan", "pro", "--password-stdin")
                self.controller_command("user", "add", name, *options, "--config", self.settings, stdin=f"{password}\n")
        with step("make a join token"):
            place = ("--name", "fra1", "--country", "DE", "--city", "Frankfurt", "--endpoint", NODE)
            token = self.controller_command("node", "token", *place, "--config", self.settings)
        with step("enrol the node"):
            agent = str(self.directory / "agent")
            served = ("--protocols", ",".join(PROTOCOLS))
            self.host.run(script("skynetvpn-agent"), "enroll", "--token", "-", "--dir", agent, *served, stdin=token)
        with step("start the node's agent"):
            run = (script("skynetvpn-agent"), "run", "--config", f"{agent}/agent.yaml")
            self.host.start(self.directory / "agent.log", *run, env={"SKYNETVPN_AGENT_POLL_SECONDS": "0.5"})
        with step("log in"):
            self.cli("login", "--url", API, "--password-stdin", "alice", stdin=f"{password}\n")
        with step("list servers until one is online"):
            self.wait(self.online, "the node does not come online")
        with step("no way to the internet yet"):
            self.expect(not self.reaches_internet(), "the client reaches the internet without a tunnel")
        with step("connect"):
            self.connect()
        with step("ping through the tunnel"):
            self.ping()
        with step("fetch 1 MiB through the tunnel"):
            self.fetch()
        with step("status: connected, traffic counted"):
            self.wait(self.counted, "the controller does not count the traffic")
        with step("end the connection from elsewhere"):
            self.cli("disconnect", self.connection_id, XDG_STATE_HOME=str(self.directory / "elsewhere"))
        with step("packets stop"):
            self.stops()
        with step("disconnect"):
            self.cli("disconnect")
            links = self.client.run("ip", "-o", "link")
            self.expect(self.interface not in links, f"{self.interface} is still there")
            self.expect(self.status() == [], "the connection is still listed")
        with step("log in as the administrator"):
            answer = self.panel("POST", "/auth/login", {"username": "boss", "password": password})
            self.token = answer["access_token"]
            self.wait(self.serving, "the node does not serve all protocols")
        for protocol in PROTOCOLS:
            with step(f"connect by {protocol}"):
                self.connect_by(protocol)
        with step("one list of sessions"):
            self.wait(lambda: self.sessions() == sorted(PROTOCOLS), "a session is missing")
        with step("fetch 1 MiB through SSH's proxy"):
            self.fetch_by_proxy()
        with step("one kick"):
            self.kick()
        with step("disconnect from all"):
            self.cli("disconnect")
            self.expect(not Path("/etc/netns", self.client.name).exists(), "the client's name servers are left")

    @property
    def settings(self) -> str:
        return str(self.directory / "controller" / "controller.yaml")

    def listen(self) -> tuple[str, ...]:
        return ("--listen", API.removeprefix("http://"), "--node-listen", f"{CONTROLLER}:8443")

    def lay_cables(self) -> None:
        etc = self.directory / "etc"  # of the node alone: SSH makes system accounts there
        shutil.copytree("/etc", etc, symlinks=True)
        self.host.run("mount", "--bind", str(etc), "/etc")
        self.client.connect(self.node, f"{CLIENT}/24", f"{NODE}/24")
        self.node.connect(self.internet, f"{NODE_OUTSIDE}/24", f"{INTERNET}/24")
        self.controller.connect(self.node, f"{CONTROLLER}/24", f"{NODE_INSIDE}/24")
        with self.internet.entered():
            server = ThreadingTCPServer((INTERNET, 80), Internet)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)

    def start(self, place: Namespace, name: str, program: str, *argv: str, **environment: str) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            own = (sys.executable, "-m", "tests.support.ownrun", script(program), *argv)
            place.popen(*own, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def controller_command(self, *argv: str, stdin: str | None = None) -> str:
        return self.controller.run(script("skynetvpn-controller"), *argv, stdin=stdin)

    def cli(self, *argv: str, stdin: str | None = None, **environment: str) -> Any:
        """Run the client where the API is on loopback; returns what it answers in JSON."""
        home = {"XDG_CONFIG_HOME": str(self.directory / "config"), "XDG_STATE_HOME": str(self.directory / "state")}
        variables = [f"{name}={value}" for name, value in (home | environment).items()]
        program = ("env", *variables, script("skynetvpn"), "-o", "json")
        answer = self.controller.run(*program, *argv, stdin=stdin, timeout=60)
        return json.loads(answer)

    def panel(self, method: str, path: str, body: object = None) -> Any:
        """Ask the API of the administrators' panel."""
        with self.controller.entered():
            connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=10)
            headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
            connection.request(method, f"/irssh/api{path}", json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            text = answer.read()
            connection.close()
        self.expect(answer.status < 300, f"{method} {path}: {answer.status} {text.decode()}")
        return json.loads(text)

    def ready(self) -> bool:
        with self.controller.entered():
            try:
                return get("127.0.0.1", "/readyz", port=8080)[0] == 200
            except OSError:
                return False

    def online(self) -> bool:
        servers = self.cli("servers")
        self.expect([server["name"] for server in servers] == ["fra1"], f"the servers are {servers}")
        self.steps.detail = f"{servers[0]['name']} {servers[0]['ip']} {servers[0]['status']}"
        return bool(servers[0]["status"] == "online")

    def connect(self) -> None:
        summary = self.cli("connect", "--netns", self.client.name, "--interface", self.interface)
        self.expect(summary["status"] == "connected", f"the connection is {summary['status']}")
        self.connection_id = summary["connection_id"]
        self.steps.detail = (
            f"{', '.join(summary['addresses'])} to {summary['endpoint']}, {summary['backend']} WireGuard, "
            f"{summary['latency_ms']} ms"
        )

    def ping(self) -> None:
        told = self.client.run("ping", "-n", "-q", "-c", "5", "-i", "0.05", "-W", "2", INTERNET)
        self.expect(" 0% packet loss" in told, f"packets are lost: {told}")
        self.steps.detail = told.strip().splitlines()[-1]

    def fetch(self) -> None:
        with self.client.entered():
            status, headers, body = get(INTERNET, "/")
        self.expect(status == 200 and body == BODY, f"the answer is {status} with {len(body)} bytes")
        self.expect(headers["X-Peer"] == NODE_OUTSIDE, f"the internet saw {headers['X-Peer']}")
        self.steps.detail = f"the internet saw {headers['X-Peer']}, the node's address"

    def counted(self) -> bool:
        (row,) = self.status()
        self.steps.detail = f"{row['status']}, {row['rx']} bytes from and {row['tx']} to the client"
        return bool(row["status"] == "connected" and row["rx"] > 0 and row["tx"] > len(BODY))

    def stops(self) -> None:
        """The client's interface is up as before; it is the node that takes its packets no more."""
        began = time.monotonic()
        self.wait(lambda: not self.reaches_internet(), "packets still pass", timeout=3)
        self.steps.detail = f"none passes {time.monotonic() - began:.1f} s after the API's answer"

    def serving(self) -> bool:
        found = {one["name"]: one["status"] for one in self.panel("GET", "/protocols")["protocols"]}
        self.steps.detail = ", ".join(f"{name} {status}" for name, status in sorted(found.items()))
        return all(found[name] == "running" for name in PROTOCOLS)

    def connect_by(self, protocol: str) -> None:
        summary = self.cli("connect", "--protocol", protocol, "--netns", self.client.name)
        self.expect(summary["status"] == "connected", f"the connection is {summary['status']}")
        self.steps.detail = str(summary["endpoint"])

    def sessions(self) -> list[str]:
        """The protocols by which alice is on."""
        rows = self.panel("GET", "/monitoring/users")["connections"]
        found = sorted(row["protocol"] for row in rows if row["username"] == "alice")
        self.steps.detail = f"alice is on by {', '.join(found)}"
        return found

    def fetch_by_proxy(self) -> None:
        """Only the name of the proxy says which way: the tunnels have the routes."""
        argv = ("curl", "-s", "-o", "/dev/null", "-w", "%{size_download}", "--socks5-hostname", PROXY)
        told = self.client.run(*argv, f"http://{INTERNET}/")
        self.expect(int(told) == len(BODY), f"{told} bytes came")

    def kick(self) -> None:
        """Throw the account out of everything that it is on by."""
        (number,) = [user["id"] for user in self.panel("GET", "/users")["users"] if user["username"] == "alice"]
        began = time.monotonic()
        self.panel("POST", f"/users/{number}/kick")
        self.wait(lambda: not self.sessions(), "a session lives on", timeout=3)
        self.steps.detail = f"all three sessions ended {time.monotonic() - began:.1f} s after the call"

    def status(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.cli("status")
        return rows

    def reaches_internet(self) -> bool:
        told = self.client.run("ping", "-n", "-q", "-c", "1", "-W", "0.5", INTERNET, check=False)
        return " 1 received" in told

    def wait(self, condition: Any, otherwise: str, timeout: float = 20) -> None:
        try:
            wait_until(condition, timeout)
        except TimeoutError as error:
            raise Failed(f"{otherwise} within {timeout:g} s") from error

    def expect(self, truth: bool, otherwise: str) -> None:
        if not truth:
            raise Failed(otherwise)

    def show_logs(self) -> None:
        for log in sorted(self.directory.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            print(f"--- {log.name}", *lines, sep="\n", file=sys.stderr)


def get(host: str, path: str, port: int = 80) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def problem() -> str | None:
    if os.geteuid() != 0:
        return "the demo makes network namespaces and needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; make install does it"
    return None


def main() -> int:
    if words := problem():
        print(words, file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    began, status = time.monotonic(), 1
    try:
        with ExitStack() as stack:
            demo = Demo(stack, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skynetvpn-demo-"))))
            try:
                demo.run()
                status = 0
            except (Failed, CommandFailed, OSError, ValueError, subprocess.SubprocessError) as error:
                print(f"failed: {error}", file=sys.stderr)
                demo.show_logs()
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # or namespaces would be left behind
                with demo.steps.step("clean up"):
                    stack.close()
    except KeyboardInterrupt:
        print("interrupted; everything was taken down", file=sys.stderr)
        return 130
    print(f"{'all of it works' if status == 0 else 'it does not work'}, {time.monotonic() - began:.1f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
