"""Speed limits and byte allowances of the kernel, with packets that really pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from agent.drivers.base import Allowed
from agent.drivers.limits import KernelLimits
from tests.support.netns import Namespace

pytestmark = pytest.mark.netns

CLIENT, SERVER, OTHER = "10.66.0.7", "192.0.2.1", "10.66.0.8"
CLIENT6, SERVER6 = "fd66::7", "2001:db8::1"
PORT = 5001
MEGABIT = 1_000_000
UID = 200_001
CUSHION = 65_536  # a packet of the largest size
# Sends SIZE bytes to whoever connects, and takes what it is sent.
_SENDER = """
import socket, sys, threading
size = int(sys.argv[1])
listener = socket.create_server(("::", int(sys.argv[2])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
def serve(peer):
    with peer:
        try:
            while size and not peer.sendall(bytes(size)):
                peer.shutdown(socket.SHUT_WR)
                break
            while peer.recv(65536):
                continue
        except OSError:
            return
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
# Reads until the end or until nothing comes for two seconds; prints the bytes that came.
_READER = """
import socket, sys
got = 0
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2) as peer:
        while data := peer.recv(65536):
            got += len(data)
except OSError:
    pass
print(got)
"""


@dataclass(frozen=True)
class Hosts:
    client: Namespace
    node: Namespace
    server: Namespace

    def iperf(self, *options: str) -> float:
        """Bits per second as the receiver saw them."""
        text = self.client.run("iperf3", "-J", "-t", "2", "-O", "1", "-c", SERVER, "-B", CLIENT, *options, timeout=60)
        return float(json.loads(text)["end"]["sum_received"]["bits_per_second"])

    def download(self, address: str = SERVER, source: Namespace | None = None, *wrapper: str) -> int:
        return int((source or self.client).run(*wrapper, sys.executable, "-c", _READER, address, str(PORT), timeout=60))


def serve(host: Namespace, *argv: str) -> None:
    child = host.popen(*argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while "ready" not in (line := child.stdout.readline().lower()) and "listening" not in line:
        assert line, f"{argv[0]} ended"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Namespace("client") as client, Namespace("node") as node, Namespace("server") as server:
        client.connect(node, f"{CLIENT}/24", "10.66.0.1/24", (f"{CLIENT6}/64", "fd66::1/64"))
        client.add_address(client.run("ip", "-o", "route", "show", "10.66.0.0/24").split()[2], f"{OTHER}/24")
        node.connect(server, "192.0.2.2/24", f"{SERVER}/24", ("2001:db8::2/64", f"{SERVER6}/64"))
        client.run("ip", "route", "add", "default", "via", "10.66.0.1")
        client.run("ip", "route", "add", "default", "via", "fd66::1")
        server.run("ip", "route", "add", "10.66.0.0/24", "via", "192.0.2.2")
        server.run("ip", "route", "add", "fd66::/64", "via", "2001:db8::2")
        node.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for port in ("5201", "5202"):
            serve(server, "iperf3", "-s", "-p", port, "--forceflush")
        with node.entered():
            yield Hosts(client, node, server)


@pytest.fixture
def sender(hosts: Hosts) -> None:
    serve(hosts.server, sys.executable, "-c", _SENDER, "5000000", str(PORT))


async def test_each_direction_is_held_to_its_own_speed_and_others_are_not(hosts: Hosts) -> None:
    limits = KernelLimits()
    await limits.apply([Allowed(7, addresses=(CLIENT,), rate_up=10 * MEGABIT, rate_down=20 * MEGABIT)])
    assert 7 * MEGABIT < hosts.iperf() < 11 * MEGABIT
    assert 14 * MEGABIT < hosts.iperf("-R") < 22 * MEGABIT
    await limits.apply([Allowed(8, addresses=(OTHER,), rate_up=10 * MEGABIT)])
    assert hosts.iperf() > 50 * MEGABIT
    await limits.apply([])
    assert hosts.iperf("-R") > 50 * MEGABIT
    await limits.close()


async def test_a_speed_changes_while_it_is_used_and_sessions_of_one_account_share_it(hosts: Hosts) -> None:
    limits = KernelLimits()
    await limits.apply([Allowed(7, addresses=(CLIENT, OTHER, CLIENT6), rate_down=100 * MEGABIT)])
    await limits.apply([Allowed(7, addresses=(CLIENT, OTHER, CLIENT6), rate_down=10 * MEGABIT)])
    assert 7 * MEGABIT < hosts.iperf("-R") < 11 * MEGABIT
    second = hosts.client.popen(
        *("iperf3", "-t", "60", "-R", "-p", "5202", "-c", SERVER, "-B", OTHER, "--forceflush"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert second.stdout is not None
    while "bits/sec" not in (line := second.stdout.readline()):  # of its first second: it is on its way
        assert line, "iperf3 ended"
    assert hosts.iperf("-R") < 8 * MEGABIT
    hosts.client.end(second)
    await limits.close()


async def test_a_new_process_takes_over_what_the_one_before_left(hosts: Hosts) -> None:
    former = KernelLimits()
    await former.apply([Allowed(7, addresses=(CLIENT,), rate_down=10 * MEGABIT, remaining=1000, grant=1)])
    await former.close()
    limits = KernelLimits()
    await limits.apply([Allowed(9, addresses=(CLIENT,), rate_down=20 * MEGABIT)])
    assert 14 * MEGABIT < hosts.iperf("-R") < 22 * MEGABIT
    await limits.apply([])
    assert hosts.iperf("-R") > 50 * MEGABIT
    assert "skynetvpn_limits" not in hosts.node.run("nft", "list", "tables")
    await limits.close()


@pytest.mark.usefixtures("sender")
async def test_an_allowance_is_exact_and_a_new_grant_lets_on(hosts: Hosts) -> None:
    limits = KernelLimits()
    await limits.apply([Allowed(7, addresses=(CLIENT, CLIENT6), remaining=1_000_000, grant=1)])
    got = hosts.download()
    assert 500_000 < got < 1_000_000 + CUSHION
    assert hosts.download(SERVER6) == 0  # the account's other address counts on the same allowance
    await limits.apply([Allowed(7, addresses=(CLIENT, CLIENT6), remaining=50_000, grant=1)])
    assert hosts.download() == 0  # the same grant: what it has counted stays
    await limits.apply([Allowed(7, addresses=(CLIENT, CLIENT6), remaining=20_000_000, grant=2)])
    assert hosts.download(SERVER6) == 5_000_000
    await limits.apply([Allowed(7, addresses=(CLIENT,))])
    assert hosts.download() == 5_000_000
    await limits.close()


@pytest.mark.usefixtures("sender")
async def test_the_traffic_of_a_users_own_processes_is_counted_and_slowed(hosts: Hosts) -> None:
    as_user = ("setpriv", f"--reuid={UID}", "--regid=65534", "--clear-groups")
    limits = KernelLimits()
    assert hosts.download(SERVER, hosts.node, *as_user) == 5_000_000
    await limits.apply([Allowed(7, uids=(UID,), remaining=1_000_000, grant=1)])
    assert 500_000 < hosts.download(SERVER, hosts.node, *as_user) < 1_000_000 + CUSHION
    assert hosts.download(SERVER, hosts.node) == 5_000_000  # other users of the host are not concerned
    await limits.apply([Allowed(7, uids=(UID,), rate_down=10 * MEGABIT)])
    took = hosts.node.run("bash", "-c", f"time {' '.join(as_user)} {sys.executable} -c '{_READER}' {SERVER} {PORT}")
    assert "5000000" in took
    await limits.close()


@pytest.mark.usefixtures("sender")
async def test_a_device_that_came_again_is_led_through_again(hosts: Hosts) -> None:
    limits = KernelLimits()
    wanted = [Allowed(7, addresses=(CLIENT,), rate_down=10 * MEGABIT)]
    await limits.apply(wanted)
    device = hosts.node.run("ip", "-o", "route", "show", "10.66.0.0/24").split()[2]
    hosts.node.run("ip", "link", "del", device)
    hosts.client.connect(hosts.node, f"{CLIENT}/24", "10.66.0.1/24")
    hosts.client.run("ip", "route", "add", "default", "via", "10.66.0.1")
    await limits.apply(wanted)
    assert hosts.iperf("-R") < 11 * MEGABIT
    await limits.close()


async def test_nothing_wanted_leaves_nothing_and_costs_no_process_the_second_time(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = KernelLimits()
    await limits.apply([])
    monkeypatch.setenv("PATH", "/nowhere")
    await limits.apply([])
    await limits.close()
    monkeypatch.undo()
    assert "sky" not in hosts.node.run("ip", "-o", "link", "show", "type", "ifb")
    assert "skynetvpn_limits" not in hosts.node.run("nft", "list", "tables")
