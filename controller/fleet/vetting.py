"""What is wrong with a change of a protocol's settings, and with which of its fields. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from controller.fleet.layers import Layer, Layers, merged
from controller.fleet.servers import ports_of
from controller.fleet.settings import FleetSettings
from shared.resource import InvalidResource, Protocol

PORT, SETTINGS = "port", "settings"

Check = Callable[[Layer], None]  # raises InvalidResource


@dataclass(frozen=True, slots=True)
class Place:
    """Where servers of several protocols are side by side: a node, or (without a name) every node to come."""

    name: str
    node_id: str
    wireguard_port: int
    protocols: tuple[Protocol, ...]


def faults(check: Check, base: Layer, port: int | None, values: Mapping[str, Any]) -> dict[str, str]:
    """The reasons by field; SETTINGS has what only several fields together do wrong."""
    remaining: dict[str, Any] = {**({PORT: port} if port is not None else {}), **values}
    problems: dict[str, str] = {}
    while (reason := _reason(check, base, remaining)) is not None:
        guilty = [name for name, value in remaining.items() if _reason(check, base, {name: value}) == reason]
        if not guilty:
            return problems | {SETTINGS: reason}
        for name in guilty:
            problems[name] = reason
            del remaining[name]
    return problems


def conflict(layers: Layers, fleet: FleetSettings, protocol: Protocol, places: Iterable[Place]) -> str | None:
    """The first port of the protocol that another one has at the same place."""
    for place in places:
        mine = _ports(layers, fleet, protocol, place)
        for other in place.protocols:
            shared = mine & _ports(layers, fleet, other, place) if other is not protocol else ()
            for transport, port in sorted(shared):
                return f"{port}/{transport} is in use by {other}" + (f" on {place.name}" if place.name else "")
    return None


def _reason(check: Check, base: Layer, changes: Mapping[str, Any]) -> str | None:
    values = {name: value for name, value in changes.items() if name != PORT}
    try:
        check(merged(base, changes.get(PORT), values))
    except InvalidResource as error:
        return str(error)
    return None


def _ports(layers: Layers, fleet: FleetSettings, protocol: Protocol, place: Place) -> frozenset[tuple[str, int]]:
    port = place.wireguard_port if protocol is Protocol.WIREGUARD else layers.port(protocol, place.node_id, fleet)
    return ports_of(protocol, port, layers.settings(protocol, place.node_id, fleet))
