"""The kernel below the tests has WireGuard; in the guest, where other tests count on it, a lack is a failure."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.netns]

IN_GUEST = os.environ.get("SKYNETVPN_KERNEL_TESTS") == "1"
SLOWDOWN = int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))
WIREGUARD_PORT = 51820


@dataclass(frozen=True, slots=True)
class Host:
    namespace: str
    underlay: str
    tunnel: str


class CommandFailed(Exception):
    pass


def run(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=20 * SLOWDOWN)
    if done.returncode:
        raise CommandFailed(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def wg(host: Host, *arguments: str, stdin: str = "") -> str:
    return run("ip", "netns", "exec", host.namespace, "wg", *arguments, stdin=stdin)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces joined by a veth pair, each with an interface wg0 that has no keys yet"""
    suffix = uuid.uuid4().hex[:8]
    near = Host(f"near-{suffix}", "192.0.2.1", "198.51.100.1")
    far = Host(f"far-{suffix}", "192.0.2.2", "198.51.100.2")
    made: list[Host] = []
    try:
        try:
            for host in (near, far):
                run("ip", "netns", "add", host.namespace)
                made.append(host)
                run("ip", "-n", host.namespace, "link", "add", "wg0", "type", "wireguard")
        except (CommandFailed, OSError) as error:
            if IN_GUEST:
                raise
            pytest.skip(f"no WireGuard interface can be made here ({error}): run make test-kernel")
        run("ip", "-n", near.namespace, "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", far.namespace)
        for host in (near, far):
            run("ip", "-n", host.namespace, "address", "add", f"{host.underlay}/24", "dev", "eth0")
            run("ip", "-n", host.namespace, "address", "add", f"{host.tunnel}/24", "dev", "wg0")
            run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            run("ip", "-n", host.namespace, "link", "set", "wg0", "up")
        yield near, far
    finally:
        for host in made:
            run("ip", "netns", "delete", host.namespace)


def test_a_packet_passes_between_two_wireguard_interfaces(hosts: tuple[Host, Host]) -> None:
    keys = {host: run("wg", "genkey").strip() for host in hosts}
    near, far = hosts
    for host, peer in ((near, far), (far, near)):
        public_key = run("wg", "pubkey", stdin=keys[peer]).strip()
        own = ["listen-port", str(WIREGUARD_PORT), "private-key", "/dev/stdin"]
        endpoint = f"{peer.underlay}:{WIREGUARD_PORT}"
        other = ["peer", public_key, "endpoint", endpoint, "allowed-ips", f"{peer.tunnel}/32"]
        wg(host, "set", "wg0", *own, *other, stdin=keys[host])

    deadline = str(10 * SLOWDOWN)
    run("ip", "netns", "exec", near.namespace, "ping", "-c", "1", "-w", deadline, far.tunnel)

    received = [int(wg(host, "show", "wg0", "transfer").split()[1]) for host in hosts]
    assert min(received) > 0
