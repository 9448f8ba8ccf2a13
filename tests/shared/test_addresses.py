from __future__ import annotations

from contextlib import nullcontext
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.addresses import (
    InvalidAddress,
    check_client_prefix,
    check_name_server,
    parse_interface,
    rate_limit_key,
)


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0/0",
        "::/0",
        "10.0.0.0/8",
        "10.66.0.0/31",
        "10.66.0.7/24",
        "::ffff:10.0.0.1/128",
        "127.0.0.1/32",
        "224.0.0.1/32",
        "fe80::1/128",
        "0.0.0.0/32",
        "010.0.0.1/32",
        "10.0.0.1",
        "FD66::1/128",
        "10.0.0.1/32\n[Peer]",
        "fd66::1%eth0/128",
        "fd66::1%\nprivate_key=00/128",
        "::1.2.3.4/128",
        "10.0.0.1\0/32",
        "",
    ],
)
def test_a_client_owns_single_unicast_addresses_only(text: str) -> None:
    with pytest.raises(InvalidAddress):
        check_client_prefix(text)


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=6, network="fd00::/8"))
def test_private_hosts_are_accepted_in_their_one_spelling(address: object) -> None:
    text = f"{address}/{32 if '.' in str(address) else 128}"
    check_client_prefix(text)


@given(st.ip_addresses())
def test_what_is_unicast_is_as_the_standard_library_has_it(address: IPv4Address | IPv6Address) -> None:
    special = address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local
    embedded = isinstance(address, IPv6Address) and int(address) >> 32 in (0, 0xFFFF)
    with pytest.raises(InvalidAddress) if special or embedded else nullcontext():
        check_client_prefix(f"{address}/{address.max_prefixlen}")


@pytest.mark.parametrize("text", ["dns.example.org", "9.9.9.9\n", "fe80::1%eth0", "fe80::1%x\nms-wins 1", ""])
def test_a_name_server_is_an_address_without_a_zone(text: str) -> None:
    check_name_server("2620:fe::fe")
    check_name_server("9.9.9.9")
    with pytest.raises(InvalidAddress):
        check_name_server(text)


def test_an_interface_address_keeps_its_prefix() -> None:
    assert str(parse_interface("10.66.0.1/16")) == "10.66.0.1/16"
    with pytest.raises(InvalidAddress):
        parse_interface("10.66.0.300/16")


def test_callers_are_counted_per_subscriber() -> None:
    assert rate_limit_key("192.0.2.1") == "192.0.2.1"
    assert rate_limit_key("2001:db8:1:2:3::4") == rate_limit_key("2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    assert rate_limit_key("2001:db8:1:3::1") != rate_limit_key("2001:db8:1:2::1")
    assert rate_limit_key("::ffff:192.0.2.1") == "192.0.2.1"
