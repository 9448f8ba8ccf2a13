"""One account by all four protocols at once: a real controller, a real agent, and each protocol's own client."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.installation import INTERNET, NODE, Installation, make_template
from tests.fleet.tunnel import Tunnel
from tests.support.l2tp import L2tpClient, require_l2tp

pytestmark = [pytest.mark.kernel, pytest.mark.netns]

PROTOCOLS = ("wireguard", "openvpn", "ssh", "l2tp")
PACKETS, SIZE = 10, 1000
PAGE_BYTES = 200_000
ADMIN_PASSWORD = "an operator's password"


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    require_l2tp()
    template = make_template(tmp_path_factory.mktemp("template"))
    with ExitStack() as stack:
        made = Installation(template, tmp_path_factory.mktemp("fleet"), stack)
        made.copy_template()
        made.start_controller()
        made.start_agent(PROTOCOLS=",".join(PROTOCOLS))
        made.log_in()
        made.wait_online()
        yield made


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="l2tp-") as name:
        yield Path(name)


class Admin:
    """The panel's view, with an operator's token."""

    def __init__(self, fleet: Installation) -> None:
        self._fleet, self._own = fleet, fleet.token
        user = ("--email", "root@example.org", "--role", "admin", "--password-stdin")
        fleet.command("user", "add", "operator", *user, stdin=f"{ADMIN_PASSWORD}\n")
        answer = fleet.call("POST", "/irssh/api/auth/login", {"username": "operator", "password": ADMIN_PASSWORD})
        assert answer.status == 200, answer.body
        self._token = answer.json["access_token"]

    def call(self, method: str, path: str) -> Any:
        self._fleet.token = self._token
        try:
            answer = self._fleet.call(method, f"/irssh/api{path}")
            assert answer.status == 200, answer.body
            return answer.json
        finally:
            self._fleet.token = self._own

    def running(self) -> bool:
        rows = self.call("GET", "/protocols")["protocols"]
        return {row["name"] for row in rows if row["status"] == "running"} >= set(PROTOCOLS)

    def sessions(self) -> list[str]:
        return sorted(row["protocol"] for row in self.call("GET", "/monitoring/users")["connections"])

    def kick(self, username: str) -> int:
        (number,) = (user["id"] for user in self.call("GET", "/users")["users"] if user["username"] == username)
        return int(self.call("POST", f"/users/{number}/kick")["kicked"])


def opened(fleet: Installation, protocol: str) -> str:
    answer = fleet.call("POST", "/api/connections?wait=applied", {"server_id": fleet.server_id, "protocol": protocol})
    assert answer.status == 201, answer.body
    return str(answer.json["connection_id"])


def config(fleet: Installation, connection: str, form: str) -> Any:
    answer = fleet.call("GET", f"/api/connections/{connection}/config?format={form}")
    assert answer.status == 200, answer.body
    return answer.json if form == "json" else answer.body.decode()


def ping(fleet: Installation, interface: str) -> None:
    options = ("-c", str(PACKETS), "-s", str(SIZE), "-i", "0.2", "-W", "5", "-I", interface)
    fleet.wait(
        lambda: fleet.client.run("ping", "-c", "1", "-W", "2", "-I", interface, INTERNET, check=False).count(
            " 1 received"
        ),
        f"{interface} does not reach the internet",
    )
    fleet.client.run("ping", *options, INTERNET)


def openvpn(fleet: Installation, connection: str) -> subprocess.Popen[Any]:
    path, log = fleet.directory / "client.ovpn", fleet.directory / "openvpn.log"
    path.touch(mode=0o600)
    path.write_text(config(fleet, connection, "conf"))
    options = ("--dev", "tunc", "--dev-type", "tun", "--route-nopull", "--verb", "3")
    process = fleet.client.start(log, "openvpn", "--config", str(path), *options)
    fleet.wait(lambda: "Initialization Sequence Completed" in log.read_text(), "OpenVPN does not connect")
    return process


def ssh(fleet: Installation, connection: str) -> subprocess.Popen[Any]:
    """A SOCKS proxy on port 1080."""
    file = config(fleet, connection, "json")
    known = fleet.directory / "known_hosts"
    known.write_text("".join(f"[{NODE}]:{file['port']} {key}\n" for key in file["host_keys"]))
    argv: tuple[str, ...] = (
        "sshpass",
        "-e",
        "ssh",
        "-F",
        "none",
        "-N",
        "-D",
        "127.0.0.1:1080",
        "-p",
        str(file["port"]),
    )
    argv += ("-o", f"UserKnownHostsFile={known}", "-o", "PubkeyAuthentication=no", f"{file['username']}@{NODE}")
    process = fleet.client.start(fleet.directory / "ssh.log", *argv, env={"SSHPASS": file["password"]})
    fleet.wait(
        lambda: ":1080 " in fleet.client.run("ss", "-Htln"),
        f"SSH does not connect: {(fleet.directory / 'ssh.log').read_text()}",
    )
    return process


def l2tp(fleet: Installation, connection: str, directory: Path) -> L2tpClient:
    file = config(fleet, connection, "json")
    client = L2tpClient(fleet.client.namespace, directory / "client", NODE)
    client.start()
    client.connect(file["psk"], file["username"], file["password"])
    return client


def test_one_account_by_all_four_protocols_at_once(fleet: Installation, short: Path) -> None:
    admin = Admin(fleet)
    fleet.wait(admin.running, "not all protocols run")
    page = fleet.directory / "page"
    page.mkdir()
    (page / "file").write_bytes(bytes(PAGE_BYTES))
    fleet.internet.popen(
        *(sys.executable, "-m", "http.server", "8000", "--directory", str(page)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ids = {protocol: opened(fleet, protocol) for protocol in PROTOCOLS}
    conf = re.sub(r"^\[Interface\]$", "[Interface]\nTable = off", config(fleet, ids["wireguard"], "conf"), flags=re.M)

    with Tunnel(fleet.client, fleet.directory / "wgc.conf", conf) as wireguard:
        tunnel, proxy = openvpn(fleet, ids["openvpn"]), ssh(fleet, ids["ssh"])
        dialled = l2tp(fleet, ids["l2tp"], short)
        for interface in (wireguard.interface, "tunc", dialled.interface()):
            ping(fleet, interface)
        fetch = ("curl", "-sf", "--retry", "20", "--retry-all-errors", "--socks5", "127.0.0.1:1080", "-o", "/dev/null")
        fleet.client.run(*fetch, f"http://{INTERNET}:8000/file")

        fleet.wait(lambda: admin.sessions() == sorted(PROTOCOLS), f"not four sessions: {admin.sessions()}")
        least = dict.fromkeys(PROTOCOLS, (PACKETS * SIZE, PACKETS * SIZE)) | {"ssh": (1, PAGE_BYTES)}

        def counted() -> bool:
            live = fleet.live()
            return all(
                (live[ids[protocol]]["rx"] >= rx and live[ids[protocol]]["tx"] >= tx)
                for protocol, (rx, tx) in least.items()
            )

        fleet.wait(counted, f"the bytes are not there: {fleet.live()}")
        for protocol, (rx, tx) in least.items():
            row = fleet.live()[ids[protocol]]
            assert row["rx"] < 2 * rx + 20_000, protocol
            assert row["tx"] < 2 * tx + 20_000, protocol

        assert admin.kick("alice") == len(PROTOCOLS)
        fleet.wait(lambda: proxy.poll() is not None and not dialled.ppp(), "a kicked client is still in")
        fleet.wait(lambda: set(admin.sessions()) <= {"openvpn"}, "a kicked session is still listed")  # it comes back
        assert not wireguard.reaches(INTERNET)
        fleet.client.namespace.end(tunnel)
