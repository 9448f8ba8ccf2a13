"""An old server that was set up by hand joins the fleet, and its client notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.keys import PrivateKey
from tests.fleet.installation import INTERNET, NODE, Installation, Template, script
from tests.fleet.tunnel import Stream, Tunnel
from tests.support.netns import unique

pytestmark = [pytest.mark.netns, pytest.mark.timeout(90)]

PLACE = ("--name", "fra1", "--country", "DE", "--city", "Frankfurt", "--endpoint", NODE)
FORWARDING = """
table ip by_hand {
    chain postrouting { type nat hook postrouting priority srcnat; oifname != "wg0" masquerade; }
}
"""


@dataclass(frozen=True, slots=True)
class OldServer:
    """wg0 with one client, as wg-quick leaves it, on a host that no agent has run on."""

    fleet: Installation
    key: PrivateKey
    client_key: PrivateKey

    def begin(self) -> None:
        conf = f"[Interface]\nPrivateKey = {self.key.reveal()}\nListenPort = 51820\n{self.peer}"
        node = self.fleet.node
        node.run("wireguard-go", "wg0")
        node.run("wg", "setconf", "wg0", "/dev/stdin", stdin=conf)
        node.run("ip", "address", "add", "10.8.0.1/24", "dev", "wg0")
        node.run("ip", "link", "set", "wg0", "mtu", "1420", "up")
        node.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        node.run("nft", "-f", "-", stdin=FORWARDING)
        self.file.write_text(conf.replace("[Interface]", "[Interface]\nAddress = 10.8.0.1/24"))

    @property
    def file(self) -> Path:
        return self.fleet.directory / "wg0.conf"

    @property
    def peer(self) -> str:
        return f"[Peer]\nPublicKey = {self.client_key.public()}\nAllowedIPs = 10.8.0.2/32\n"

    def client(self) -> Tunnel:
        conf = (
            f"[Interface]\nPrivateKey = {self.client_key.reveal()}\nAddress = 10.8.0.2/24\n"
            f"[Peer]\nPublicKey = {self.key.public()}\nEndpoint = {NODE}:51820\nAllowedIPs = {INTERNET}/32\n"
        )
        return Tunnel(self.fleet.client, self.fleet.directory / f"{unique('old')}.conf", conf)

    def join(self, *options: str) -> None:
        """What an operator does: import, ask for a token, enrol, start."""
        home, agent = ("--dir", str(self.fleet.agent_home)), script("skynetvpn-agent")
        self.fleet.node.run(agent, "import", str(self.file), *home)
        token = self.fleet.command("node", "token", *PLACE, *options)
        self.fleet.node.run(agent, "enroll", "--token", "-", *home, stdin=token)
        self.fleet.start_agent()

    def addresses(self) -> set[str]:
        shown = self.fleet.node.run("ip", "-o", "-4", "address", "show", "dev", "wg0").splitlines()
        return {line.split()[3] for line in shown}

    def peers(self) -> set[str]:
        return set(self.fleet.node.run("wg", "show", "wg0", "peers").split())

    def index(self) -> str:
        return self.fleet.node.run("cat", "/sys/class/net/wg0/ifindex")


@pytest.fixture
def old(template: Template, tmp_path: Path) -> Iterator[OldServer]:
    with ExitStack() as stack:
        fleet = Installation(template, tmp_path, stack)
        fleet.copy_template()
        for path in fleet.agent_home.iterdir():  # the host is another one than the template's
            path.unlink()
        fleet.start_controller()
        fleet.log_in()
        server = OldServer(fleet, PrivateKey.generate(), PrivateKey.generate())
        server.begin()
        yield server


def undisturbed(tunnel: Tunnel, stream: Stream, handshake: int) -> None:
    stream.flows(50)
    assert stream.lost() == set()
    assert tunnel.transfer().handshake == handshake


def test_client_of_the_old_server_does_not_notice_that_it_joins_a_fleet(old: OldServer) -> None:
    fleet = old.fleet
    with old.client() as client, client.stream(INTERNET) as stream:
        handshake, index = client.transfer().handshake, old.index()
        old.join("--interface", "wg0", "--port", "51820")
        fleet.wait_online()
        fleet.wait(lambda: old.addresses() == {"10.8.0.1/24", "10.66.0.1/16"}, "the pool's address does not come")
        undisturbed(client, stream, handshake)
        connected = fleet.connect()
        with fleet.tunnel(connected):
            both = {str(old.client_key.public()), connected.public_key}
            assert old.peers() == both
            fleet.node.run("nft", "delete", "table", "ip", "by_hand")
            fleet.wait(lambda: client.reaches(INTERNET), "the agent's table does not serve the imported network")
            undisturbed(client, stream, handshake)
            fleet.stop_agent()
            fleet.start_agent(RECHECK_SECONDS="0.2")
            fleet.wait(lambda: fleet.agent_metric("skynetvpn_agent_connected") == 1, "the agent does not come back")
            undisturbed(client, stream, handshake)
            assert (old.peers(), old.index()) == (both, index)
        assert old.addresses() == {"10.8.0.1/24", "10.66.0.1/16"}
        assert fleet.agent_metric("skynetvpn_agent_drift_total") == 0
        assert fleet.agent_metric("skynetvpn_agent_failures") == 0
        assert fleet.agent_metric("skynetvpn_agent_peers") == 2
        assert "not applied" not in fleet.nodes()


def test_old_server_waits_for_the_operator_where_the_node_has_another_interface(old: OldServer) -> None:
    fleet = old.fleet
    with old.client() as client, client.stream(INTERNET) as stream:
        handshake, index = client.transfer().handshake, old.index()
        old.join()
        fleet.wait_told("--interface wg0 --port 51820")
        assert fleet.node.run("ls", "/sys/class/net").split().count("sky0") == 0
        undisturbed(client, stream, handshake)
        fleet.command("node", "token", *PLACE, "--interface", "wg0", "--port", "51820")
        fleet.wait_online()
        fleet.wait_told("not applied", now=False)
        with fleet.tunnel(fleet.connect()):
            undisturbed(client, stream, handshake)
        assert old.index() == index
        assert fleet.agent_metric("skynetvpn_agent_drift_total") == 0
