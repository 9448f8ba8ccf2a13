"""The services as docs/operations.md has them installed, on a machine that systemd has booted.

What a fleet does is tested elsewhere: here is what systemd adds, which are accounts, capabilities, sandboxes,
directories, the watchdog, and what outlives which end of the agent.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.installation import script
from tests.support.netns import CommandFailed, Namespace
from tests.systemd.machine import PATIENCE, PROJECT, Machine

pytestmark = [pytest.mark.netns, pytest.mark.timeout(int(5 * PATIENCE))]

AGENT, CONTROLLER, STARTER = "skynetvpn-agent.service", "skynetvpn-controller.service", "skynetvpn-openvpn.socket"
OPENVPN = "skynetvpn-openvpn@*.service"
PASSWORD = "tr0ub4dor and 3"
HERE, CLIENT = "192.0.2.1", "192.0.2.2"
PROXY, PORT = "127.0.0.1:1080", 8000
DROP_INS = "/etc/systemd/system/skynetvpn-agent.service.d"
ALONE = ("wireguard", "openvpn")
SERVERS = ("wireguard-go", "openvpn", "sshd")
QUIET: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
CAP_NET_BIND_SERVICE, CAP_NET_ADMIN = 10, 12


class Installed:
    """A machine with controller and agent, and a client on another host."""

    def __init__(self, stack: ExitStack, directory: Path, protocols: tuple[str, ...]) -> None:
        self.protocols = protocols
        self.machine = stack.enter_context(Machine())
        self.client = stack.enter_context(Namespace("client"))
        self.machine.network.connect(self.client, f"{HERE}/24", f"{CLIENT}/24")
        self.machine.boot()
        self._cli = (f"XDG_CONFIG_HOME={directory}/config", f"XDG_STATE_HOME={directory}/state", script("skynetvpn"))
        self._token = ""
        controller, host, more = documented()
        self.administer(controller, {"--dir /var/lib/skynetvpn": f"--node-address {HERE}:8443"})
        for name, role in (("alice", "user"), ("boss", "admin")):
            user = ("add", name, "--email", f"{name}@example.org", "--role", role, "--plan", "enterprise")
            self.command("user", *user, "--password-stdin", stdin=f"{PASSWORD}\n")
        place = ("--name", "fra1", "--country", "DE", "--city", "Frankfurt", "--endpoint", HERE)
        token = self.command("node", "token", *place)
        self.administer(more)
        if protocols != ALONE:
            self.machine.run("sh", "-c", f"cp systemd/protocols.d/*.conf {DROP_INS}")
        self.administer(host, {"--token -": f"--protocols {','.join(protocols)}"}, stdin=token)
        login = self.call("POST", "/irssh/api/auth/login", {"username": "boss", "password": PASSWORD})
        self._token = login["access_token"]
        self.machine.wait(self.all_run, "not every protocol runs")
        self.client.popen(sys.executable, "-m", "http.server", "--directory", str(directory), str(PORT), **QUIET)
        self.cli("login", "alice", "--url", "http://127.0.0.1:8080", "--password-stdin", stdin=f"{PASSWORD}\n")

    def administer(self, commands: list[str], more: dict[str, str] | None = None, stdin: str | None = None) -> None:
        """Type in what is documented; `more` is added after the words that are its keys."""
        for command in commands:
            for words, added in (more or {}).items():
                command = command.replace(words, f"{words} {added}")
            if not command.startswith("apt-get "):  # the packages are there, and the machine has no way to a mirror
                self.machine.run("sh", "-c", command, stdin=stdin)

    def command(self, *argv: str, stdin: str | None = None) -> str:
        program = ".venv/bin/skynetvpn-controller"
        return self.machine.run(program, *argv, user="skynetvpn", stdin=stdin)

    def call(self, method: str, path: str, body: object = None) -> Any:
        argv = ["curl", "-s", "--show-error", "--fail-with-body", "-X", method, f"http://127.0.0.1:8080{path}"]
        argv += ["-H", f"Authorization: Bearer {self._token}", "-H", "Content-Type: application/json"]
        return json.loads(self.machine.network.run(*argv, *(() if body is None else ("-d", json.dumps(body)))))

    def cli(self, *argv: str, stdin: str | None = None) -> str:
        """The client's command line; its tunnels are in the client's namespace."""
        return self.machine.network.run("env", *self._cli, *argv, stdin=stdin, timeout=2 * PATIENCE)

    def connect(self) -> None:
        """By every protocol."""
        for protocol in self.protocols:
            told = self.cli("connect", "--protocol", protocol, "--netns", self.client.name, "-o", "json")
            assert json.loads(told)["status"] == "connected", told

    def all_run(self) -> bool:
        told = self.call("GET", "/irssh/api/protocols")["protocols"]
        return {each["name"] for each in told if each["status"] == "running"} == set(self.protocols)

    def words(self, protocol: str) -> str:
        (line,) = (line for line in self.command("node", "status", "fra1").splitlines() if line.startswith(protocol))
        return line

    def sessions(self) -> dict[str, str]:
        """Since when alice is in, by protocol: another session has another moment."""
        rows = self.call("GET", "/irssh/api/monitoring/users")["connections"]
        return {row["protocol"]: row["connected_since"] for row in rows if row["username"] == "alice"}

    def passes(self) -> set[str]:
        """The protocols by which packets of the client come back."""
        found = set()
        links = json.loads(self.client.run("ip", "-j", "-4", "address", "show"))
        addresses = {each["local"]: link["ifname"] for link in links for each in link["addr_info"]}
        for protocol, network in (("wireguard", "10.66."), ("openvpn", "10.67.")):
            for device in (device for address, device in addresses.items() if address.startswith(network)):
                told = self.client.run("ping", "-c1", "-W2", "-I", device, f"{network}0.1", check=False)
                found |= {protocol} if "1 received" in told else set()
        if self.client.run("curl", "-s", "--socks5", PROXY, f"http://{CLIENT}:{PORT}/", check=False):
            found.add("ssh")
        return found

    def servers(self) -> dict[str, list[int]]:
        """What runs for the protocols."""
        found = {name: self.machine.pids(name) for name in SERVERS}
        return {name: pids for name, pids in found.items() if pids}

    def agent(self) -> int:
        (pid,) = self.machine.unit(AGENT, "MainPID")
        return int(pid)

    def restarts(self) -> int:
        (count,) = self.machine.unit(AGENT, "NRestarts")
        return int(count)

    def online(self) -> bool:
        """The agent serves, and the controller has heard so."""
        told = self.machine.network.run("curl", "-s", "http://127.0.0.1:9586/metrics", check=False)
        return "skynetvpn_agent_connected 1" in told and self.all_run()


def documented() -> list[list[str]]:
    """What an administrator types in on the controller's machine, on a host, and for more protocols."""
    chapter = (PROJECT / "docs/operations.md").read_text().split("\n## ")[1]
    assert chapter.startswith("Running as services")
    blocks = re.findall(r"```console\n(.*?)```", chapter, re.DOTALL)
    return [[line.removeprefix("# ") for line in block.splitlines()] for block in blocks]


KINDS = [
    pytest.param(ALONE, id="without-root"),
    pytest.param((*ALONE, "ssh"), id="with-all-drop-ins"),  # for L2TP this kernel has too little
]


@pytest.fixture(scope="module", params=KINDS)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    with ExitStack() as stack:
        made = Installed(stack, tmp_path_factory.mktemp("machine"), request.param)
        yield made
        made.cli("disconnect")


@pytest.fixture
def machine(installed: Installed) -> Machine:
    return installed.machine


@pytest.fixture
def connected(installed: Installed) -> Installed:
    """Clients are in by every protocol."""
    if set(installed.sessions()) != set(installed.protocols):
        installed.cli("disconnect")
        installed.connect()
    installed.machine.wait(lambda: set(installed.sessions()) == set(installed.protocols), "a session is missing")
    assert installed.passes() == set(installed.protocols)
    return installed


def capabilities(machine: Machine, pid: int) -> tuple[int, int]:
    """Those that it has, and those that it could ever get."""
    fields = dict(line.split(":\t") for line in machine.run("cat", f"/proc/{pid}/status").splitlines() if ":\t" in line)
    return int(fields["CapEff"], 16), int(fields["CapBnd"], 16)


def user(machine: Machine, pid: int) -> str:
    return machine.run("stat", "--format=%U", f"/proc/{pid}").strip()


def test_the_services_run_as_whom_and_with_what_their_units_say(installed: Installed) -> None:
    machine, root = installed.machine, installed.protocols != ALONE
    for unit, account in ((CONTROLLER, "skynetvpn"), (AGENT, "root" if root else "skynetvpn-agent")):
        state, pid, capable = machine.unit(unit, "ActiveState", "MainPID", "NoNewPrivileges")
        assert (state, capable) == ("active", "yes")
        assert user(machine, int(pid)) == account
        assert unit == AGENT or capabilities(machine, int(pid)) == (0, 0)
    if not root:
        only = 1 << CAP_NET_ADMIN
        assert capabilities(machine, installed.agent()) == (only, only)
    servers = machine.pids("openvpn")
    assert len(servers) == 2
    for server in servers:
        few = 1 << CAP_NET_ADMIN | 1 << CAP_NET_BIND_SERVICE
        assert user(machine, server) == "skynetvpn-openvpn"
        assert capabilities(machine, server) == (few, few)
        group = machine.run("cat", f"/proc/{server}/cgroup")
        assert "/system-skynetvpn\\x2dopenvpn.slice/skynetvpn-openvpn@" in group


def test_drop_ins_add_up(installed: Installed) -> None:
    told = installed.machine.unit(AGENT, "SystemCallFilter", "RestrictAddressFamilies", "CapabilityBoundingSet")
    calls, families, capable = (set(words.split()) for words in told)
    more = installed.protocols != ALONE
    for allowed, beyond in (
        (calls, {"setuid", "fchown", "chroot", "pidfd_getfd", "mount"}),
        (families, {"AF_PACKET", "AF_PPPOX"}),
        (capable, {"cap_sys_ptrace", "cap_sys_chroot", "cap_sys_admin"}),
    ):
        assert allowed & beyond == (beyond if more else set())
    assert "init_module" not in calls
    assert {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"} <= families
    assert "cap_net_admin" in capable


def test_directories_are_private_to_their_service(installed: Installed) -> None:
    owner = user(installed.machine, installed.agent())
    for path, mode, account in (
        ("/var/lib/skynetvpn", 0o700, "skynetvpn"),
        ("/var/lib/skynetvpn-agent", 0o700, owner),
        ("/var/lib/skynetvpn-agent/openvpn", 0o700, owner),
        ("/run/wireguard", 0o700, owner),
        ("/run/skynetvpn-openvpn", 0o1770, "skynetvpn-agent"),
        ("/run/skynetvpn-openvpn/start", 0o600, "skynetvpn-agent"),
    ):
        told = installed.machine.run("stat", "--format=%a %U", path).split()
        assert (path, int(told[0], 8), told[1]) == (path, mode, account)
    denied = ("cat", "/var/lib/skynetvpn-agent/node.key")
    with pytest.raises(CommandFailed, match="Permission denied"):
        installed.machine.run(*denied, user="skynetvpn-openvpn")


def test_clients_get_in_by_every_protocol(connected: Installed) -> None:
    """And nothing that a service needed was denied to it."""
    told = connected.machine.run("journalctl", "--no-pager", "--output=cat", f"--unit={AGENT}", f"--unit={OPENVPN}")
    assert not [line for line in told.splitlines() if re.search("not permitted|denied|read-only", line, re.IGNORECASE)]


def test_ssh_tunnels_work_in_the_agents_sandbox(connected: Installed) -> None:
    """Their devices are made by the agent, and opened by an sshd that has become the user."""
    if "ssh" not in connected.protocols:
        pytest.skip("it is not served")
    machine, protocol = connected.machine, "/irssh/api/protocols/ssh"
    connected.cli("disconnect")
    connected.call("PUT", protocol, {"settings": {"tun": True}})
    try:
        told = connected.cli("connect", "--protocol", "ssh", "--tun", "--netns", connected.client.name, "-o", "json")
        assert json.loads(told)["status"] == "connected", told
        machine.wait(lambda: set(connected.sessions()) == {"ssh"}, "the session is not seen")
        assert "1 received" in connected.client.run("ping", "-c1", "-W5", "10.68.0.1")
        assert "tun190" in machine.network.run("ip", "link")
    finally:
        connected.cli("disconnect")
        connected.call("PUT", protocol, {"settings": {"tun": None}})
    machine.wait(lambda: "tun190" not in machine.network.run("ip", "link"), "the devices stay")


@pytest.mark.parametrize("end", ["restart", "kill", "stop"])
def test_sessions_outlive_the_agent(connected: Installed, end: str) -> None:
    machine, servers, sessions = connected.machine, connected.servers(), connected.sessions()
    agent, restarts = connected.agent(), connected.restarts()
    match end:
        case "restart":
            machine.run("systemctl", "restart", AGENT)  # it returns when the agent has said that it is ready
        case "kill":
            machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", AGENT)
            machine.wait(lambda: connected.restarts() == restarts + 1, "systemd does not start the agent again")
        case "stop":
            machine.run("systemctl", "stop", AGENT)
            assert machine.unit(AGENT, "ActiveState") == ["inactive"]
            assert connected.passes() == set(connected.protocols)
            machine.run("systemctl", "start", AGENT)
    machine.wait(connected.online, "the agent does not come back")
    assert connected.agent() not in (agent, 0)
    assert connected.servers() == servers
    assert connected.sessions() == sessions
    assert connected.passes() == set(connected.protocols)


def test_an_agent_that_hangs_is_killed_and_its_servers_are_not(connected: Installed) -> None:
    machine, servers = connected.machine, connected.servers()
    machine.run("mkdir", "-p", "/run/systemd/system/skynetvpn-agent.service.d")
    machine.run("tee", "/run/systemd/system/skynetvpn-agent.service.d/soon.conf", stdin="[Service]\nWatchdogSec=4s\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", AGENT)
    restarts = connected.restarts()
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", AGENT)
    machine.wait(lambda: connected.restarts() == restarts + 1, "the watchdog does not bite")
    machine.wait(connected.online, "the agent does not come back")
    assert connected.servers() == servers
    assert connected.passes() == set(connected.protocols)


def test_an_openvpn_that_dies_is_started_again(installed: Installed) -> None:
    machine = installed.machine
    before = set(machine.pids("openvpn"))
    victim = min(before)
    machine.run("kill", "-KILL", str(victim))
    machine.wait(lambda: len(set(machine.pids("openvpn")) - {victim}) == 2, "no other one comes")
    machine.wait(installed.all_run, "it does not run")
    assert len(machine.run("systemctl", "list-units", "--plain", "--no-legend", OPENVPN).splitlines()) == 2


def test_a_port_that_openvpn_cannot_have_is_told_and_left_again(installed: Installed) -> None:
    machine = installed.machine
    with machine.network.entered():
        taken = socket.create_server(("0.0.0.0", 1195))
    with taken:
        installed.call("PUT", "/irssh/api/protocols/openvpn", {"port": 1195})
        machine.wait(lambda: "in use" in installed.words("openvpn"), "the node does not say so")
    installed.call("PUT", "/irssh/api/protocols/openvpn", {"port": 443})
    machine.wait(installed.all_run, "a port below 1024 is not served")
    installed.call("PUT", "/irssh/api/protocols/openvpn", {"port": 1194})
    machine.wait(lambda: ":1194" in machine.run("ss", "-lntu") and installed.all_run(), "it does not move back")
    machine.wait(lambda: len(machine.pids("openvpn")) == 2, "one too many runs")


def test_a_host_is_taken_out_of_service(installed: Installed) -> None:
    """Last, for nothing runs after it: the agent's end leaves the tunnels, and an administrator ends those."""
    machine = installed.machine
    machine.run("systemctl", "stop", AGENT)
    assert len(machine.pids("openvpn")) == 2
    machine.run("systemctl", "stop", STARTER, OPENVPN)
    machine.run("ip", "link", "delete", "sky0")
    machine.run("nft", "delete", "table", "inet", "skynetvpn")
    machine.wait(lambda: not machine.pids("openvpn") and not machine.pids("wireguard-go"), "a server stays")
    assert machine.run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "skynetvpn*") == ""
