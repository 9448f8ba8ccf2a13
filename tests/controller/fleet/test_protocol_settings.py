"""The rules of protocol settings, without a database."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.fleet.layers import FLEET, Layer, Layers, merged, read_changes, shown
from controller.fleet.servers import KINDS, ports_of
from controller.fleet.settings import FleetSettings
from controller.fleet.vetting import Place, conflict, faults
from shared.resource import InvalidResource, Kind, Protocol

FLEET_SETTINGS = FleetSettings(
    channel_address="127.0.0.1:8443", ipv4_pool=ip_network("10.66.0.0/16"), dns=("9.9.9.9", "2620:fe::9"), mtu=1400
)
ALL = tuple(Protocol)
PSK = Layer(settings={"psk": "a-pre-shared-key"})
NOTHING = Layers({(Protocol.L2TP, FLEET): PSK})


def test_every_protocol_has_a_kind_of_server() -> None:
    assert set(KINDS) == set(Protocol)
    assert KINDS[Protocol.WIREGUARD] == Kind.WIREGUARD_INTERFACE


def test_defaults_come_from_the_operators_settings() -> None:
    settings = {protocol: shown(NOTHING.settings(protocol, FLEET, FLEET_SETTINGS)) for protocol in Protocol}
    assert settings == {
        "wireguard": {"mtu": 1400, "masquerade": True, "isolate": True},
        "openvpn": {
            "transports": ["udp", "tcp"],
            "mtu": 1400,
            "keepalive": 10,
            "dns": ["9.9.9.9", "2620:fe::9"],
            "max_clients": 1024,
            "masquerade": True,
            "isolate": True,
        },
        "ssh": {"tcp_forwarding": True, "tun": False, "keepalive": 15},
        "l2tp": {"dns": ["9.9.9.9"], "mtu": 1400, "masquerade": True, "isolate": True},
    }
    ports = {protocol: NOTHING.port(protocol, "n", FLEET_SETTINGS) for protocol in Protocol}
    assert ports == {"wireguard": 51820, "openvpn": 1194, "ssh": 2222, "l2tp": 1701}


def test_a_secret_is_in_no_repr() -> None:
    shown_ = repr(NOTHING) + repr(PSK) + repr(NOTHING.settings(Protocol.L2TP, "1", FLEET_SETTINGS))
    assert "a-pre-shared-key" not in shown_


def test_a_node_has_its_own_over_the_fleets_over_the_defaults() -> None:
    layers = Layers(
        {
            (Protocol.OPENVPN, FLEET): Layer(443, {"mtu": 1300, "keepalive": 20}),
            (Protocol.OPENVPN, "1"): Layer(None, {"mtu": 1350}),
        }
    )
    assert layers.port(Protocol.OPENVPN, "1", FLEET_SETTINGS) == 443
    of_the_node = shown(layers.settings(Protocol.OPENVPN, "1", FLEET_SETTINGS))
    of_another = shown(layers.settings(Protocol.OPENVPN, "2", FLEET_SETTINGS))
    assert (of_the_node["mtu"], of_the_node["keepalive"], of_the_node["max_clients"]) == (1350, 20, 1024)
    assert (of_another["mtu"], of_another["keepalive"]) == (1300, 20)


def test_none_is_as_if_it_were_not_set() -> None:
    layer = merged(Layer(443, {"mtu": 1300, "keepalive": 20}), None, {"mtu": None, "isolate": False})
    assert layer == Layer(443, {"keepalive": 20, "isolate": False})
    assert merged(layer, 444, {}) == Layer(444, {"keepalive": 20, "isolate": False})


@pytest.mark.parametrize(
    ("protocol", "given_", "wrong"),
    [
        ("openvpn", {"cipher": "none", "mtu": "1400", "isolate": 1}, {"cipher", "mtu", "isolate"}),
        ("openvpn", {"transports": ["sctp"]}, {"transports"}),
        ("openvpn", {"transports": "udp"}, {"transports"}),
        ("openvpn", {"dns": ["9.9.9.9"] * 5, "keepalive": True}, {"dns", "keepalive"}),
        ("openvpn", {"ca": "x", "tls_crypt": "x", "ipv4_pool": "10.0.0.0/8"}, {"ca", "tls_crypt", "ipv4_pool"}),
        ("ssh", {"tun": "yes", "psk": "12345678"}, {"tun", "psk"}),
        ("l2tp", {"psk": 12345678, "mtu": 1400.5}, {"psk", "mtu"}),
        ("wireguard", {"addresses": ["10.0.0.1/8"], "dns": []}, {"addresses", "dns"}),
    ],
)
def test_each_wrong_setting_is_named(protocol: str, given_: dict[str, Any], wrong: set[str]) -> None:
    _, problems = read_changes(Protocol(protocol), given_)
    assert set(problems) == wrong


def test_what_is_set_right_beside_what_is_wrong_is_read() -> None:
    values, problems = read_changes(Protocol.OPENVPN, {"mtu": 1300, "transports": ["tcp"], "x": 1, "dns": None})
    assert values == {"mtu": 1300, "transports": ("tcp",), "dns": None}
    assert problems == {
        "x": "openvpn has no such setting; it has transports, mtu, keepalive, dns, max_clients, masquerade, isolate"
    }


def sum_is_even(layer: Layer) -> None:
    """A parser that refuses what is above nine, and a sum that is odd."""
    everything = {"port": layer.port or 0, **layer.settings}
    for name, value in everything.items():
        if value > 9:
            raise InvalidResource(f"{name} {value} is above nine")
    if sum(everything.values()) % 2:
        raise InvalidResource("the sum is odd")


@given(st.none() | st.integers(1, 12), st.dictionaries(st.sampled_from("abcd"), st.integers(0, 12)))
def test_the_parsers_words_go_to_the_fields_that_they_are_about(port: int | None, values: dict[str, int]) -> None:
    base = Layer(2, {"a": 0, "b": 4})
    problems = faults(sum_is_even, base, port, values)
    wanted = {**({"port": port} if port is not None else {}), **values}
    assert {name for name, reason in problems.items() if "above" in reason} == {
        name for name, value in wanted.items() if value > 9
    }
    try:
        sum_is_even(merged(base, port, values))
    except InvalidResource:
        assert problems
    else:
        assert not problems


def place(*protocols: Protocol, wireguard: int = 51820, name: str = "fra1") -> Place:
    return Place(name, "1", wireguard, protocols)


@pytest.mark.parametrize(
    ("protocol", "port", "words"),
    [
        (Protocol.OPENVPN, 51820, "51820/udp is in use by wireguard on fra1"),
        (Protocol.OPENVPN, 2222, "2222/tcp is in use by ssh on fra1"),
        (Protocol.OPENVPN, 500, "500/udp is in use by l2tp on fra1"),
        (Protocol.OPENVPN, 4500, "4500/udp is in use by l2tp on fra1"),
        (Protocol.OPENVPN, 1701, "1701/udp is in use by l2tp on fra1"),
        (Protocol.SSH, 1194, "1194/tcp is in use by openvpn on fra1"),
        (Protocol.SSH, 51820, None),
        (Protocol.SSH, 500, None),
        (Protocol.OPENVPN, 1195, None),
    ],
)
def test_a_port_of_another_protocol_is_in_use(protocol: Protocol, port: int, words: str | None) -> None:
    layers = NOTHING.changed(protocol, FLEET, Layer(port))
    assert conflict(layers, FLEET_SETTINGS, protocol, [place(*ALL)]) == words


def test_a_port_is_free_where_its_protocol_is_not_offered() -> None:
    layers = NOTHING.changed(Protocol.OPENVPN, FLEET, Layer(500))
    assert conflict(layers, FLEET_SETTINGS, Protocol.OPENVPN, [place(Protocol.WIREGUARD, Protocol.OPENVPN)]) is None


def test_wireguard_and_openvpn_share_a_number_where_one_has_only_tcp() -> None:
    layers = NOTHING.changed(Protocol.OPENVPN, FLEET, Layer(443, {"transports": ["tcp"]}))
    assert conflict(layers, FLEET_SETTINGS, Protocol.OPENVPN, [place(*ALL, wireguard=443)]) is None
    assert ports_of(Protocol.OPENVPN, 443, layers.settings(Protocol.OPENVPN, "1", FLEET_SETTINGS)) == {("tcp", 443)}
