"""An installation whose node serves all four protocols, and alice with a client of each: for the virtual machine.

Both services are forked from a process that has imported them (tests/support/warm.py), and hash passwords at a low
cost: the rest is as on a real host.
"""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.fleet.installation import INTERNET, NODE, Installation, Template, install
from tests.fleet.tunnel import Tunnel
from tests.support.l2tp import L2tpClient
from tests.support.netns import Running
from tests.support.warm import WarmHost, warm_up

PROTOCOLS = ("l2tp", "openvpn", "ssh", "wireguard")
PROXY = ("--socks5", "127.0.0.1:1080")
_PASSWORDS = {"memory_kib": 64, "time_cost": 1}
_AGENT = {"POLL_SECONDS": "1", "RECHECK_SECONDS": "300"}
_CIPHERS = ("seqiv(rfc4106(gcm(aes)))", "rfc7539(chacha20,poly1305)")
_WEB = 8000
_ANSWER = re.compile(r"^\[(\d+\.\d+)\] \d+ bytes from", re.MULTILINE)


class FourWays:
    """`directory` must be short: it holds a socket."""

    def __init__(self, directory: Path, stack: ExitStack, protocols: tuple[str, ...] = PROTOCOLS) -> None:
        self._directory, self._stack, self._protocols = directory, stack, protocols
        self.lac: L2tpClient | None = None
        self._openvpn: Running | None = None
        self._ssh: Running | None = None
        warm_up()
        ciphers = threading.Thread(target=_load_ciphers)
        ciphers.start()
        fleet = self.fleet = Installation(Template(directory, "", ""), directory, stack, WarmHost)
        fleet.template, fleet.service = install(fleet.controller, fleet.node, directory, passwords=_PASSWORDS)
        fleet.start_agent(PROTOCOLS=",".join(protocols), **_AGENT)
        password = fleet.template.password
        boss = ("user", "add", "boss", "--email", "boss@example.org", "--role", "admin", "--password-stdin")
        fleet.command(*boss, stdin=f"{password}\n")
        login = fleet.call("POST", "/irssh/api/auth/login", {"username": "boss", "password": password})
        self._admin = login.json["access_token"]
        fleet.log_in()
        fleet.wait_online()
        fleet.wait(self._running, "not all protocols run")
        self.account = next(one["id"] for one in self.admin("GET", "/users")["users"] if one["username"] == "alice")
        self._serve_web()
        ciphers.join()

    # --- the operator ---

    def admin(self, method: str, path: str, body: object = None) -> Any:
        mine, self.fleet.token = self.fleet.token, self._admin
        try:
            answer = self.fleet.call(method, f"/irssh/api{path}", body)
        finally:
            self.fleet.token = mine
        assert answer.status == 200, answer.body
        return answer.json

    def kick(self) -> int:
        """Alice, with all she has; how many sessions there were."""
        kicked: int = self.admin("POST", f"/users/{self.account}/kick")["kicked"]
        return kicked

    def on(self) -> list[str]:
        """The protocols by which alice is on, as the panel lists them."""
        rows = self.admin("GET", "/monitoring/users")["connections"]
        return sorted(row["protocol"] for row in rows if row["username"] == "alice")

    def bytes(self) -> dict[str, tuple[int, int]]:
        """From and to the client, by protocol."""
        return {row["protocol"]: (row["rx"], row["tx"]) for row in self.fleet.live().values()}

    def _running(self) -> bool:
        states = self.admin("GET", "/protocols")["protocols"]
        return {one["name"] for one in states if one["status"] == "running"} >= set(self._protocols)

    # --- alice ---

    def used(self) -> int:
        """Bytes, of her quota."""
        used: int = self.admin("GET", f"/users/{self.account}")["used_bytes"]
        return used

    def config(self, protocol: str, form: str = "json") -> Any:
        """The client's settings for a new connection."""
        wanted = {"server_id": self.fleet.server_id, "protocol": protocol}
        answer = self.fleet.call("POST", "/api/connections?wait=applied", wanted)
        assert answer.status == 201, answer.body
        told = self.fleet.call("GET", f"/api/connections/{answer.json['connection_id']}/config?format={form}")
        assert told.status == 200, told.body
        return told.json if form == "json" else told.body.decode()

    def wireguard(self) -> str:
        """Return the name of the interface, as those of the other tunnels do."""
        conf = self.config("wireguard", "conf").replace("[Interface]\n", "[Interface]\nTable = off\n")
        return self._stack.enter_context(Tunnel(self.fleet.client, self._directory / "wgc.conf", conf)).interface

    def openvpn(self) -> str:
        """The second call connects again, as for L2TP."""
        path, log = self._directory / "client.ovpn", self._directory / "openvpn.log"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(self.config("openvpn", "conf"))
        options = ("--dev", "tunc", "--dev-type", "tun", "--route-nopull", "--remap-usr1", "SIGTERM")
        log.write_bytes(b"")
        self._openvpn = self.fleet.client.start(log, "openvpn", "--config", str(path), *options)
        self.fleet.wait(lambda: "Initialization Sequence Completed" in log.read_text(), "OpenVPN does not connect")
        return "tunc"

    def ssh(self) -> Running:
        """The way through it is PROXY."""
        file = self.config("ssh")
        known = self._directory / "known_hosts"
        known.write_text("".join(f"[{NODE}]:{file['port']} {key}\n" for key in file["host_keys"]))
        options = ("-o", f"UserKnownHostsFile={known}", "-o", "PubkeyAuthentication=no", "-p", str(file["port"]))
        argv = ("sshpass", "-e", "ssh", "-F", "none", "-N", "-D", PROXY[1], *options, f"{file['username']}@{NODE}")
        self._ssh = self.fleet.client.start(self._directory / "ssh.log", *argv, env={"SSHPASS": file["password"]})
        self.fleet.wait(self._proxied, "SSH does not connect")
        return self._ssh

    def l2tp(self) -> str:
        """The second call dials again."""
        if self.lac is None:
            self.lac = L2tpClient(self.fleet.client.namespace, self._directory / "lac", NODE)
            self.lac.start()
            self._l2tp = self.config("l2tp")
            self.lac.secure(self._l2tp["psk"])
        self.lac.dial(self._l2tp["username"], self._l2tp["password"])
        self.lac.wait_for_address()
        return self.lac.interface()

    def ended(self) -> bool:
        """Whether none of her programs that would be ended by a kick is there."""
        programs = [program for program in (self._openvpn, self._ssh) if program is not None]
        return all(program.poll() is not None for program in programs) and not (self.lac and self.lac.ppp())

    def reaches(self, interface: str) -> bool:
        asked = ("ping", "-n", "-c", "1", "-W", "2", "-I", interface, INTERNET)
        return " 1 received" in self.fleet.client.run(*asked, check=False)

    def ping(self, interface: str, packets: int, size: int) -> None:
        options = ("-q", "-c", str(packets), "-s", str(size), "-i", "0.05", "-W", "5", "-I", interface)
        told = self.fleet.client.run("ping", *options, INTERNET, check=False)
        assert f" {packets} received" in told, told

    def download(self, size: int, way: tuple[str, str]) -> int:
        """Bytes that came, until nothing more does."""
        options = ("-s", "-o", "/dev/null", "-w", "%{size_download}", "--speed-limit", "1", "--speed-time", "3")
        argv = ("curl", *options, *way, f"http://{INTERNET}:{_WEB}/{size}")
        return int(self.fleet.client.run(*argv, check=False) or 0)

    @contextmanager
    def pinging(self, interface: str, every: str = "0.05") -> Iterator[Pings]:
        """Without a pause."""
        pings = Pings(self._directory / f"{interface}.ping")
        pings.path.unlink(missing_ok=True)
        client = self.fleet.client.start(pings.path, "ping", "-n", "-D", "-i", every, "-I", interface, INTERNET)
        try:
            self.fleet.wait(lambda: len(pings.answers()) > 10, f"{interface} does not reach the internet")
            yield pings
        finally:
            self.fleet.client.namespace.end(client)

    def _proxied(self) -> bool:
        host, _, port = PROXY[1].rpartition(":")
        with self.fleet.client.namespace.entered(), socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def _serve_web(self) -> None:
        with self.fleet.internet.entered():
            server = ThreadingHTTPServer(("", _WEB), _Web)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)


@dataclass(frozen=True, slots=True)
class Pings:
    path: Path

    def answers(self) -> list[float]:
        """When each one came."""
        return [float(moment) for moment in _ANSWER.findall(self.path.read_text())]


class _Web(BaseHTTPRequestHandler):
    """Answers `GET /N` with N bytes."""

    def do_GET(self) -> None:
        size = int(self.path.strip("/"))
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        try:
            for _ in range(0, size, 10_000):
                self.wfile.write(bytes(min(size, 10_000)))
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _load_ciphers() -> None:
    """Have the kernel load what IPsec and WireGuard ask for: that takes it half a minute where it is emulated."""
    for name in _CIPHERS:
        with suppress(OSError), socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as opened:
            opened.bind(("aead", name))


@contextmanager
def four_ways(protocols: tuple[str, ...] = PROTOCOLS) -> Iterator[FourWays]:
    """Gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="sky-"))
    try:
        with ExitStack() as stack:
            yield FourWays(directory, stack, protocols)
    finally:
        shutil.rmtree(directory)
