"""The packet filter on a host: one table of its own, changes by others noticed, and what packets it lets pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.drivers.base import DriverError, Tunnels, Unsupported
from agent.drivers.nftables import Nftables, enable_forwarding
from shared.desired import Interface
from tests.support.netns import Namespace

pytestmark = pytest.mark.netns


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace("host") as namespace, namespace.entered():
        yield namespace


WG0 = Interface(name="wg0", listen_port=51820, addresses=("10.66.0.1/16", "fd66::1/64"))


async def test_the_table_is_observed_until_it_is_taken_away(host: Namespace) -> None:
    firewall = Nftables()
    assert await firewall.observe() is None

    await firewall.apply([WG0])
    loaded = await firewall.observe()
    assert loaded is not None
    await firewall.apply([WG0])
    assert await firewall.observe() == loaded

    await firewall.apply([])
    assert await firewall.observe() is None
    await firewall.apply([])


@pytest.mark.parametrize(
    "change",
    [
        ("add", "rule", "inet", "skynetvpn", "forward", "accept"),
        ("flush", "chain", "inet", "skynetvpn", "postrouting"),
        ("add", "chain", "inet", "skynetvpn", "mine"),
        ("add", "chain", "inet", "skynetvpn", "forward", "{ policy drop ; }"),
    ],
)
async def test_a_change_by_hand_is_noticed_and_undone(host: Namespace, change: tuple[str, ...]) -> None:
    firewall = Nftables()
    await firewall.apply([WG0])
    loaded = await firewall.observe()

    host.run("nft", *change)
    assert await firewall.observe() not in (loaded, None)

    await firewall.apply([WG0])
    assert await firewall.observe() == loaded


async def test_rules_are_listed_anew_only_after_a_change_of_any_table(host: Namespace, tmp_path: Path) -> None:
    calls, program = tmp_path / "calls", tmp_path / "nft"
    program.write_text(f'#!/bin/sh\necho "$*" >>{calls}\nexec nft "$@"\n')
    program.chmod(0o755)
    firewall = Nftables(str(program))
    await firewall.apply([WG0])
    loaded = await firewall.observe()

    def listings() -> int:
        return calls.read_text().count("list table")

    assert [await firewall.observe() for _ in range(3)] == [loaded] * 3
    assert listings() == 1
    host.run("nft", "add", "table", "inet", "theirs")
    assert [await firewall.observe() for _ in range(2)] == [loaded] * 2
    assert listings() == 2
    host.run("nft", "flush", "ruleset")
    assert [await firewall.observe() for _ in range(2)] == [None, None]
    assert listings() == 3
    await firewall.close()


async def test_other_tables_are_left_alone(host: Namespace) -> None:
    host.run("nft", "-f", "-", stdin="table inet theirs { chain forward { type filter hook forward priority 0; }; }")
    firewall = Nftables()
    await firewall.apply([WG0])
    await firewall.apply([])
    assert "table inet theirs" in host.run("nft", "list", "ruleset")


async def test_forwarding_is_switched_on_for_the_versions_in_use(host: Namespace) -> None:
    await Nftables().apply([Interface(name="wg0", listen_port=1, addresses=("10.66.0.1/16",))])
    read = ("sysctl", "-n", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
    assert host.run(*read).split() == ["1", "0"]
    await Nftables().apply([WG0])
    assert host.run(*read).split() == ["1", "1"]


async def test_a_host_without_nft_says_so() -> None:
    with pytest.raises(Unsupported, match="no-such-nft is not installed"):
        await Nftables(program="no-such-nft").observe()


def test_a_setting_that_cannot_be_written_names_it(tmp_path: Path) -> None:
    path = tmp_path / "net/ipv4/ip_forward"
    path.mkdir(parents=True)
    with pytest.raises(DriverError, match="ip_forward"):
        enable_forwarding(tmp_path, [4])


def test_a_router_still_accepts_its_own_default_route(tmp_path: Path) -> None:
    for name, value in (("all", "1"), ("eth0", "1"), ("eth1", "0"), ("lo", "1")):
        directory = tmp_path / "net/ipv6/conf" / name
        directory.mkdir(parents=True)
        (directory / "accept_ra").write_text(f"{value}\n")
        (directory / "forwarding").write_text("0\n")

    enable_forwarding(tmp_path, [6])

    conf = tmp_path / "net/ipv6/conf"
    assert (conf / "all/forwarding").read_text() == "1"
    assert [(conf / name / "accept_ra").read_text().strip() for name in ("all", "eth0", "eth1", "lo")] == list("1201")


def test_what_is_on_already_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "net/ipv4/ip_forward"
    path.parent.mkdir(parents=True)
    path.write_text("1\n")
    path.chmod(0o444)
    enable_forwarding(tmp_path, [4])
    assert path.read_text() == "1\n"


# Packets: veth pairs stand for the tunnels, so that every case of the table is reached without keys.


@pytest.fixture
def network() -> Iterator[dict[str, Namespace]]:
    """Two clients behind the tunnels wg0 and wg1 of a node, and a host on the internet; the node masquerades."""
    with (
        Namespace("node") as node,
        Namespace("one") as one,
        Namespace("two") as two,
        Namespace("net") as internet,
    ):
        for client, tunnel, number in ((one, "wg0", 66), (two, "wg1", 67)):
            here, there = node.connect(client, f"10.{number}.0.1/24", f"10.{number}.0.2/24")
            node.run("ip", "link", "set", here, "down")
            node.run("ip", "link", "set", here, "name", tunnel)
            node.run("ip", "link", "set", tunnel, "up")
            client.run("ip", "route", "add", "default", "via", f"10.{number}.0.1", "dev", there)
        node.connect(internet, "192.0.2.1/24", "192.0.2.2/24")
        yield {"node": node, "one": one, "two": two, "net": internet}


def passes(source: Namespace, target: str, *options: str) -> bool:
    return " 1 received" in source.run("ping", "-c1", "-W1", *options, target, check=False)


def load(node: Namespace, *, isolate: bool) -> None:
    specs = [
        Interface(name="wg0", listen_port=1, addresses=("10.66.0.1/24",), isolate=isolate),
        Interface(name="wg1", listen_port=2, addresses=("10.67.0.1/24",), isolate=isolate),
    ]
    node.call(lambda: Nftables().apply(specs))


def test_clients_reach_the_internet_by_the_nodes_address_and_not_each_other(network: dict[str, Namespace]) -> None:
    load(network["node"], isolate=True)
    assert passes(network["one"], "192.0.2.2")  # the internet host has no route back but to the node's own address
    assert not passes(network["one"], "10.67.0.2")
    assert not passes(network["two"], "10.66.0.2")


def test_clients_reach_each_other_where_they_may(network: dict[str, Namespace]) -> None:
    load(network["node"], isolate=False)
    assert passes(network["one"], "10.67.0.2")


def test_nobody_reaches_a_client_by_its_inner_address(network: dict[str, Namespace]) -> None:
    load(network["node"], isolate=True)
    network["net"].run("ip", "route", "add", "10.66.0.0/24", "via", "192.0.2.1")
    assert not passes(network["net"], "10.66.0.2")


def test_an_address_that_is_not_the_clients_is_dropped(network: dict[str, Namespace]) -> None:
    load(network["node"], isolate=True)
    network["one"].run("ip", "address", "add", "198.51.100.9/32", "dev", "lo")
    network["node"].run("ip", "route", "add", "198.51.100.9/32", "via", "10.66.0.2")
    assert not passes(network["one"], "192.0.2.1", "-I", "198.51.100.9")
    assert passes(network["one"], "192.0.2.1")


# The same for a server whose devices have no known names: only its pool is told.


def load_with_pool(node: Namespace, *, isolate: bool) -> None:
    wireguard = Interface(name="wg0", listen_port=1, addresses=("10.66.0.1/24",), isolate=False)
    pool = Tunnels("l2tp", ("10.67.0.0/24",), isolate=isolate)
    node.call(lambda: Nftables().apply([wireguard], [pool]))


def test_clients_of_a_pool_reach_the_internet_by_the_nodes_address_and_no_other_client(
    network: dict[str, Namespace],
) -> None:
    load_with_pool(network["node"], isolate=True)
    assert passes(network["two"], "192.0.2.2")
    assert not passes(network["two"], "10.66.0.2")
    assert not passes(network["one"], "10.67.0.2")


@pytest.mark.parametrize("isolate", [True, False])
def test_clients_of_one_pool_reach_each_other_only_where_they_may(network: dict[str, Namespace], isolate: bool) -> None:
    pool = Tunnels("openvpn", ("10.66.0.0/24", "10.67.0.0/24"), isolate=isolate)
    network["node"].call(lambda: Nftables().apply([], [pool]))
    assert passes(network["two"], "10.66.0.2") is not isolate
    assert passes(network["one"], "192.0.2.2")


def test_nobody_reaches_a_client_of_a_pool_by_its_inner_address(network: dict[str, Namespace]) -> None:
    load_with_pool(network["node"], isolate=True)
    network["net"].run("ip", "route", "add", "10.67.0.0/24", "via", "192.0.2.1")
    assert not passes(network["net"], "10.67.0.2")


@pytest.mark.parametrize("inner", ["10.66.0.9", "10.67.0.9"], ids=["of wg0", "of a pool"])
def test_a_clients_address_comes_from_its_own_device_only(network: dict[str, Namespace], inner: str) -> None:
    node, outside = network["node"], network["net"]
    load_with_pool(node, isolate=True)
    counter = f"chain input {{ type filter hook input priority 0; ip saddr {inner} counter; }}"
    node.run("nft", "-f", "-", stdin=f"table inet seen {{ {counter}; }}")
    node.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
    outside.run("ip", "address", "add", f"{inner}/32", "dev", "lo")

    def arrived() -> bool:
        outside.run("ping", "-c1", "-W1", "-I", inner, "192.0.2.1", check=False)
        return "packets 0" not in node.run("nft", "list", "table", "inet", "seen")

    assert not arrived()
    node.run("nft", "flush", "chain", "inet", "skynetvpn", "prerouting")
    assert arrived()


async def test_forwarding_is_switched_on_for_a_pool_alone(host: Namespace) -> None:
    await Nftables().apply([], [Tunnels("openvpn", ("10.70.0.0/16", "fd70::/64"))])
    read = ("sysctl", "-n", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
    assert host.run(*read).split() == ["1", "1"]
    await Nftables().apply([])
    assert await Nftables().observe() is None
