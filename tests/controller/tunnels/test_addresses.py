"""Slots and addresses."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.tunnels.addresses import Pool
from shared.addresses import check_client_prefix

pools = st.builds(
    Pool,
    st.builds(
        lambda base, prefix: IPv4Network((base, prefix), strict=False),
        st.integers(0x0A000000, 0x0AFFFFFF),
        st.integers(16, 30),
    ),
    st.builds(
        lambda base, prefix: IPv6Network((base, prefix), strict=False),
        st.integers(0xFD66 << 112, (0xFD67 << 112) - 1),
        st.integers(64, 126),
    ),
)


@given(pools, st.data())
def test_every_slot_has_addresses_of_its_own_inside_the_pool(pool: Pool, data: st.DataObject) -> None:
    slots = data.draw(st.sets(st.integers(0, pool.capacity - 1), min_size=1, max_size=20)) | {0, pool.capacity - 1}
    seen: set[str] = set()
    reserved = {pool.ipv4.network_address, pool.ipv4.broadcast_address, pool.ipv6.network_address}
    reserved |= {pool.ipv4[1], pool.ipv6[1]}  # the node's own
    for slot in slots:
        for text in pool.client_addresses(slot):
            check_client_prefix(text)
        ipv4, ipv6 = (ip_interface(text).ip for text in pool.client_addresses(slot))
        assert ipv4 in pool.ipv4 and ipv6 in pool.ipv6
        assert not {ipv4, ipv6} & reserved
        seen |= {str(ipv4), str(ipv6)}
    assert len(seen) == 2 * len(slots)


@given(pools, st.integers())
def test_a_slot_outside_the_pool_is_refused(pool: Pool, slot: int) -> None:
    if 0 <= slot < pool.capacity:
        slot -= pool.capacity
    with pytest.raises(ValueError, match="slot"):
        pool.client_addresses(slot)


def test_the_node_has_the_first_address_and_clients_follow() -> None:
    pool = Pool.parse("10.66.0.0/16", "fd66::/64")
    assert pool.client_addresses(0) == ("10.66.0.2/32", "fd66::2/128")
    assert pool.client_addresses(pool.capacity - 1)[0] == "10.66.255.254/32"
    assert pool.capacity == 2**16 - 3


@pytest.mark.parametrize(("ipv4", "ipv6"), [("10.0.0.0/31", "fd66::/64"), ("10.0.0.0/24", "fd66::/127")])
def test_a_pool_without_room_is_refused(ipv4: str, ipv6: str) -> None:
    assert ip_network(ipv4)
    with pytest.raises(ValueError, match="no room"):
        Pool.parse(ipv4, ipv6)
