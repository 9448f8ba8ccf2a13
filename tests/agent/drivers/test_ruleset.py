"""The packet filter's text: what it says for any interfaces, and that nft takes it and lists it back the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Interface

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.drivers.nftables import Nftables
from agent.drivers.ruleset import render
from shared.desired import Interface, InvalidResource
from tests.support.netns import Namespace

names = st.from_regex(r"[A-Za-z0-9_-]{1,15}", fullmatch=True)
ipv4 = st.builds(
    lambda number, length: str(IPv4Interface((number, length))), st.integers(1 << 24, (1 << 31) - 1), st.integers(8, 32)
)
ipv6 = st.builds(
    lambda number, length: str(IPv6Interface((number, length))),
    st.integers(1 << 125, (1 << 126) - 1),
    st.integers(16, 128),
)
interfaces = st.lists(
    st.builds(
        Interface,
        name=names,
        listen_port=st.just(51820),
        addresses=st.lists(ipv4 | ipv6, min_size=1, max_size=4).map(tuple),
        masquerade=st.booleans(),
        isolate=st.booleans(),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda interface: interface.name,
)


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    with Namespace("nft") as namespace:
        yield namespace


@pytest.mark.netns
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=interfaces)
def test_nft_loads_any_interfaces_and_lists_them_the_same_after_a_reload(
    host: Namespace, wanted: list[Interface]
) -> None:
    firewall = Nftables()

    async def load_and_read() -> str | None:
        await firewall.apply(wanted)
        return await firewall.observe()

    first = host.call(load_and_read)
    assert first is not None
    wanted.reverse()
    assert host.call(load_and_read) == first


@given(wanted=interfaces)
def test_the_whole_table_is_replaced_and_no_other_named(wanted: list[Interface]) -> None:
    lines = render(wanted).splitlines()
    assert lines[:3] == ["table inet skynetvpn", "delete table inet skynetvpn", "table inet skynetvpn {"]
    assert not any("table" in line for line in lines[3:])
    assert "flush" not in render(wanted)


def test_without_interfaces_the_table_goes_away() -> None:
    assert render([]) == "table inet skynetvpn\ndelete table inet skynetvpn\n"


@pytest.mark.parametrize("name", ['wg0" drop; flush ruleset; #', "wg*", "", "wg0\n"])
def test_a_name_that_could_end_a_rule_is_refused(name: str) -> None:
    with pytest.raises(InvalidResource):
        render([Interface(name=name, listen_port=1, addresses=("10.66.0.1/16",))])


def test_only_masquerading_interfaces_have_nat() -> None:
    routed = Interface(name="wg0", listen_port=1, addresses=("10.66.0.1/16",), masquerade=False)
    assert "masquerade" not in render([routed])


def test_the_only_interface_is_isolated_by_one_rule() -> None:
    text = render([Interface(name="wg0", listen_port=51820, addresses=("10.0.0.1/24",))])
    assert text.count('iifname "wg0" oifname "wg0" drop') == 1
    assert '{ "wg0" }' not in text


@pytest.mark.netns
def test_nft_itself_checks_the_text_in_a_namespace(host: Namespace) -> None:
    text = render([Interface(name="wg0", listen_port=1, addresses=("10.66.0.1/16", "fd66::1/64"))])
    host.run("nft", "-c", "-f", "-", stdin=text)
    with pytest.raises((AssertionError, subprocess.SubprocessError)):
        host.run("nft", "-c", "-f", "-", stdin=text.replace("masquerade", "masquerode"))
