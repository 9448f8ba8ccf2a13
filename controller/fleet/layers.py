"""The settings of each protocol: defaults, over them the fleet's, over them a node's own. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from controller.fleet.settings import FleetSettings
from shared.resource import Protocol
from shared.services import L2TP_PORT

FLEET = ""  # in place of a node's id
SECRET = frozenset({"psk"})  # settings that are written, and never shown
DEFAULT_PORTS = {Protocol.OPENVPN: 1194, Protocol.SSH: 2222, Protocol.L2TP: L2TP_PORT}
Addresses = Annotated[tuple[str, ...], msgspec.Meta(max_length=4)]


class WireGuardSettings(msgspec.Struct, frozen=True, kw_only=True):
    mtu: int
    masquerade: bool = True
    isolate: bool = True


class OpenVpnSettings(msgspec.Struct, frozen=True, kw_only=True):
    transports: tuple[Literal["udp", "tcp"], ...] = ("udp", "tcp")
    mtu: int
    keepalive: int = 10
    dns: Addresses
    max_clients: int = 1024
    masquerade: bool = True
    isolate: bool = True


class SshSettings(msgspec.Struct, frozen=True, kw_only=True):
    tcp_forwarding: bool = True
    tun: bool = False
    keepalive: int = 15


class L2tpSettings(msgspec.Struct, frozen=True, kw_only=True):
    psk: str
    dns: Addresses
    mtu: int = 1400
    masquerade: bool = True
    isolate: bool = True

    def __repr__(self) -> str:
        return f"L2tpSettings(dns={self.dns}, mtu={self.mtu})"


Settings = WireGuardSettings | OpenVpnSettings | SshSettings | L2tpSettings

_MODELS: dict[Protocol, type[Settings]] = {
    Protocol.WIREGUARD: WireGuardSettings,
    Protocol.OPENVPN: OpenVpnSettings,
    Protocol.SSH: SshSettings,
    Protocol.L2TP: L2tpSettings,
}
_TYPES = {
    protocol: {field.name: field.type for field in msgspec.structs.fields(model)} for protocol, model in _MODELS.items()
}


@dataclass(frozen=True, slots=True)
class Layer:
    """What was set for the fleet or for one node; what is not in it (a port of None) comes from below."""

    port: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)  # with secrets


@dataclass(frozen=True, slots=True)
class Layers:
    """All that was set, by protocol and node id (FLEET = of all nodes); secrets are in `settings` like the rest."""

    set: Mapping[tuple[Protocol, str], Layer]

    def own(self, protocol: Protocol, node_id: str) -> Layer:
        return self.set.get((protocol, node_id), Layer())

    def port(self, protocol: Protocol, node_id: str, fleet: FleetSettings) -> int:
        default = fleet.wireguard_port if protocol is Protocol.WIREGUARD else DEFAULT_PORTS[protocol]
        set_ = (self.own(protocol, node_id).port, self.own(protocol, FLEET).port, default)
        return next(port for port in set_ if port is not None)

    def settings(self, protocol: Protocol, node_id: str, fleet: FleetSettings) -> Settings:
        above = {**self.own(protocol, FLEET).settings, **self.own(protocol, node_id).settings}
        return msgspec.convert(_defaults(protocol, fleet) | above, _MODELS[protocol])

    def changed(self, protocol: Protocol, node_id: str, layer: Layer) -> Layers:
        return Layers({**self.set, (protocol, node_id): layer})


def read_changes(protocol: Protocol, given: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the right types (None = as if it were not set), and what is wrong with the others by name."""
    types, values, problems = _TYPES[protocol], dict[str, Any](), dict[str, str]()
    for name, value in given.items():
        if name not in types:
            problems[name] = f"{protocol} has no such setting; it has {', '.join(types)}"
            continue
        try:
            values[name] = None if value is None else msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            problems[name] = str(error)[:1].lower() + str(error)[1:]
    return values, problems


def merged(layer: Layer, port: int | None, values: Mapping[str, Any]) -> Layer:
    """The layer with these changes."""
    settings = {name: value for name, value in {**layer.settings, **values}.items() if value is not None}
    return Layer(layer.port if port is None else port, settings)


def shown(settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(settings)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if name not in SECRET
    }


def _defaults(protocol: Protocol, fleet: FleetSettings) -> dict[str, Any]:
    match protocol:
        case Protocol.WIREGUARD:
            return {"mtu": fleet.mtu}
        case Protocol.OPENVPN:
            return {"mtu": fleet.mtu, "dns": list(fleet.dns)}
        case Protocol.L2TP:
            return {"dns": [address for address in fleet.dns if ":" not in address]}  # PPP's name servers are IPv4
        case _:
            return {}
