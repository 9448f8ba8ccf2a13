"""An installation whose node serves the other protocols, and what administrators and clients do with it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.fleet.installation import INTERNET, PATIENCE, Answer, Installation, Template, script
from tests.support.netns import wait_until

PASSWORD = "tr0ub4dor and 3"
PROXY = "127.0.0.1:1080"
_PORT = 8000
# Answers `GET /N` with N bytes, and takes whatever is posted.
_SERVER = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        size = int(self.path.strip("/"))
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        try:
            for _ in range(size // 10000):
                self.wfile.write(bytes(10000))
        except OSError:
            self.close_connection = True
    def log_message(self, *_):
        return
print("ready", flush=True)
ThreadingHTTPServer(("", %d), Handler).serve_forever()
"""


class Serving:
    """`fleet` with a node that serves `protocols`, an administrator, and a client that is logged in as alice."""

    def __init__(self, template: Template, directory: Path, stack: ExitStack, protocols: str) -> None:
        self.fleet = Installation(template, directory, stack)
        self.fleet.copy_template()
        self._cli = (f"XDG_CONFIG_HOME={directory}/config", f"XDG_STATE_HOME={directory}/state", script("skynetvpn"))
        self._protocols = protocols
        self._clients: list[subprocess.Popen[Any]] = []
        self._connected = False
        self.fleet.start_controller()
        self.start_agent()
        self.fleet.log_in()
        self.fleet.wait_online()
        add = ("user", "add", "boss", "--email", "boss@example.org", "--role", "admin", "--password-stdin")
        self.fleet.command(*add, stdin=f"{PASSWORD}\n")
        login = self.fleet.call("POST", "/irssh/api/auth/login", {"username": "boss", "password": PASSWORD})
        self._admin = login.json["access_token"]
        wanted = set(protocols.split(","))
        self.fleet.wait(lambda: wanted <= set(self.statuses("running")), "a protocol does not run")
        self.cli("login", "alice", "--url", "http://127.0.0.1:8080", "--password-stdin", stdin=f"{template.password}\n")
        server = self.fleet.internet.popen(sys.executable, "-c", _SERVER % _PORT, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

    def start_agent(self, protocols: str = "") -> None:
        self.fleet.start_agent(PROTOCOLS=protocols or self._protocols, LOG_LEVEL="debug")

    # --- the administrator ---

    def admin(self, method: str, path: str, body: object = None, status: int = 200) -> Any:
        mine, self.fleet.token = self.fleet.token, self._admin
        try:
            answer: Answer = self.fleet.call(method, f"/irssh/api{path}", body)
        finally:
            self.fleet.token = mine
        assert answer.status == status, answer.body
        return answer.json

    def user(self, name: str, *protocols: str, **limits: object) -> str:
        """A new account; return its path."""
        new = {"username": name, "email": f"{name}@example.org", "password": PASSWORD, "protocols": protocols}
        path = f"/users/{self.admin('POST', '/users', new, 201)['id']}"
        if limits:
            self.admin("PUT", path, limits)
        return path

    def statuses(self, status: str) -> list[str]:
        """The protocols that have it."""
        return [one["name"] for one in self.admin("GET", "/protocols")["protocols"] if one["status"] == status]

    def on(self, name: str) -> list[str]:
        """The protocols by which the account is on, by the panel."""
        connections = self.admin("GET", "/monitoring/users")["connections"]
        return sorted(one["protocol"] for one in connections if one["username"] == name)

    def used(self, path: str) -> int:
        used: int = self.admin("GET", path)["used_bytes"]
        return used

    # --- clients ---

    def cli(self, *argv: str, stdin: str | None = None) -> str:
        """The client's command line where it reaches the API; tunnels go into the client's namespace."""
        return self.fleet.controller.run("env", *self._cli, *argv, stdin=stdin, timeout=120)

    def connect(self, protocol: str) -> dict[str, Any]:
        name, self._connected = self.fleet.client.namespace.name, True
        found: dict[str, Any] = json.loads(self.cli("connect", "--protocol", protocol, "--netns", name, "-o", "json"))
        assert found["status"] == "connected", found
        return found

    def ssh(self, name: str, password: str = PASSWORD, proxy: str = PROXY) -> subprocess.Popen[Any]:
        """An ordinary ssh program with the account's own name and password."""
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "PubkeyAuthentication=no")
        argv = ["sshpass", "-e", "ssh", "-N", "-D", proxy, "-p", "2222", "-l", name]
        argv += [word for option in (*options, "NumberOfPasswordPrompts=1") for word in ("-o", option)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        client = self.fleet.client.namespace.popen(*argv, "192.0.2.1", env={"SSHPASS": password}, **quiet)
        self._clients.append(client)
        return client

    def ssh_until_on(self, name: str, password: str = PASSWORD) -> None:
        """As a person tries again, where a change has to reach the node first."""
        client = self.ssh(name, password)

        def on() -> bool:
            nonlocal client
            if client.poll() is not None:
                client = self.ssh(name, password)
            return self.on(name) == ["ssh"]

        self.fleet.wait(on, f"{name} is not let in")

    def end_clients(self) -> None:
        """Whatever a test has brought up."""
        if self._connected:
            self.cli("disconnect")
            self._connected = False
        for client in self._clients:
            self.fleet.client.namespace.end(client)
        self._clients.clear()

    def download(self, size: int, *options: str, seconds: int = 30) -> int:
        """Bytes that came from the internet, by the way that the options say."""
        told = self.fleet.client.namespace.run(
            *("curl", "-s", "-o", "/dev/null", "-w", "%{size_download}", "--max-time", str(seconds), *options),
            f"http://{INTERNET}:{_PORT}/{size}",
            timeout=seconds + 10,
            check=False,
        )
        return int(told or 0)

    def by_proxy(self, size: int, proxy: str = PROXY, seconds: int = 30) -> int:
        return self.download(size, "--socks5-hostname", proxy, seconds=seconds)

    def wait_on(self, name: str, protocols: list[str], timeout: float = PATIENCE) -> float:
        return self.fleet.wait(lambda: self.on(name) == protocols, f"{name} is not on by {protocols}", timeout)

    def ended(self, client: subprocess.Popen[Any], timeout: float = PATIENCE) -> None:
        wait_until(lambda: client.poll() is not None, timeout)
