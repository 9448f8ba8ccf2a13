"""Peers as a host may really have them, wider than those a controller may ask for."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from hypothesis import strategies as st

from shared.desired import Peer

keys = st.binary(min_size=32, max_size=32)
secrets = keys.filter(any)
ipv4 = st.builds(
    lambda number, mask: str(IPv4Network((number, mask), strict=False)),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 32),
)
ipv6 = st.builds(
    lambda number, mask: str(IPv6Network((number, mask), strict=False)),
    st.integers(0, (1 << 128) - 1).filter(lambda number: number >> 32 not in (0, 0xFFFF)),  # not IPv4 in disguise
    st.integers(97, 128),
)
peers = st.builds(
    Peer,
    public_key=secrets,
    allowed_ips=st.lists(ipv4 | ipv6, max_size=20, unique=True).map(tuple),
    preshared_key=st.none() | secrets,
    keepalive=st.integers(0, 65535),
)
peer_lists = st.lists(peers, max_size=8, unique_by=lambda peer: peer.public_key)
