"""Which server, which tunnel is meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.client.api import Server
from agent.client.errors import Misuse
from agent.client.profile import LocalTunnel
from agent.client.selection import least_loaded, server_by_name, tunnels_by_name

servers = st.lists(
    st.builds(
        Server,
        id=st.uuids().map(str),
        name=st.text("abc", min_size=1, max_size=3),
        country=st.just("DE"),
        ip=st.just("192.0.2.1"),
        status=st.sampled_from(["online", "offline", "maintenance"]),
        load=st.none() | st.floats(0, 100),
    ),
    max_size=8,
)


@given(servers)
def test_least_loaded_is_online_and_no_other_online_server_has_less(found: list[Server]) -> None:
    best = least_loaded(found)

    online = [server for server in found if server.status == "online"]
    assert (best is None) == (not online)
    if best is not None:
        assert best in online
        known = [server.load for server in online if server.load is not None]
        assert best.load == min(known, default=None)


@given(servers)
def test_choice_does_not_depend_on_the_order(found: list[Server]) -> None:
    assert least_loaded(found) == least_loaded(found[::-1])


def test_server_is_found_by_id_before_name_and_by_name_in_any_case() -> None:
    found = [a_server("1", "fra1"), a_server("fra1", "ams1")]

    assert server_by_name(found, "fra1") is found[1]
    assert server_by_name(found, "FRA1") is found[0]


@pytest.mark.parametrize("wanted", ["nowhere", "fra1"])
def test_unknown_and_ambiguous_servers_are_wrong_usage(wanted: str) -> None:
    with pytest.raises(Misuse, match="skynetvpn servers"):
        server_by_name([a_server("1", "fra1"), a_server("2", "fra1")], wanted)


@pytest.mark.parametrize("wanted", ["c1", "skyvpn0", "s1", "FRA1"])
def test_tunnel_is_found_by_connection_interface_and_server(wanted: str) -> None:
    first, second = a_tunnel("c1", "s1", "fra1", "skyvpn0"), a_tunnel("c2", "s2", "ams1", "skyvpn1")

    assert tunnels_by_name([first, second], wanted) == [first]
    assert tunnels_by_name([first, second], None) == [first, second]
    assert tunnels_by_name([second], wanted) == []


def a_server(id: str, name: str) -> Server:
    return Server(id=id, name=name, country="DE", ip="192.0.2.1", status="online")


def a_tunnel(connection_id: str, server_id: str, server: str, interface: str) -> LocalTunnel:
    return LocalTunnel(connection_id, server_id, server, interface, "userspace", "/k")
