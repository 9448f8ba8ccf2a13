"""Peers as a host may really have them, wider than those a controller may ask for."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from shared.desired import Peer

# Other tests may have the machine's cores: how long an example takes says nothing about the code.
unhurried = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])

keys = st.binary(min_size=32, max_size=32)
secrets = keys.map(lambda raw: raw if any(raw) else b"\1" * 32)  # all zero stands for no key
ipv4 = st.builds(
    lambda number, mask: str(IPv4Network((number, mask), strict=False)),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 32),
)
ipv6 = st.builds(
    lambda number, mask: str(IPv6Network((number, mask), strict=False)),
    st.integers(0x2000 << 112, 0xFDFF << 112),
    st.integers(97, 128),
)
peers = st.builds(
    Peer,
    public_key=secrets,
    allowed_ips=st.lists(ipv4 | ipv6, max_size=20, unique=True).map(tuple),
    preshared_key=st.none() | secrets,
    keepalive=st.integers(0, 65535),
)


def clients(*keepalives: int) -> st.SearchStrategy[Peer]:
    """Peers as a controller makes them: one address of each family."""
    return st.builds(
        Peer,
        public_key=secrets,
        allowed_ips=st.tuples(
            st.integers(0, (1 << 32) - 1).map(lambda number: f"{IPv4Address(number)}/32"),
            st.integers(0x2000 << 112, 0xFDFF << 112).map(lambda number: f"{IPv6Address(number)}/128"),
        ),
        preshared_key=st.none() | secrets,
        keepalive=st.sampled_from(keepalives),
    )


peer_lists = st.lists(peers, max_size=8, unique_by=lambda peer: peer.public_key)
