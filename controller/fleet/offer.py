"""What a node may serve and what clients need to know of it, as it says in its hello."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from controller.desired import service as desired
from shared.access import parse_ssh_key
from shared.protocol import Hello
from shared.resource import InvalidResource, Protocol

_MAX_HOST_KEYS = 8


@dataclass(frozen=True, slots=True)
class Offer:
    protocols: tuple[Protocol, ...] = (Protocol.WIREGUARD,)
    ssh_host_keys: tuple[str, ...] = ()  # bare `type base64`
    ledger: str = ""  # the identity of its usage records

    @classmethod
    def of(cls, hello: Hello) -> Offer:
        """What this version knows of it; an agent that names no protocol is from when there was one."""
        names = hello.protocols or [Protocol.WIREGUARD]
        keys = [key for key in map(_host_key, hello.ssh_host_keys[:_MAX_HOST_KEYS]) if key is not None]
        return cls(known_protocols(names), tuple(keys), hello.ledger)


def known_protocols(names: Iterable[str]) -> tuple[Protocol, ...]:
    """In one order, each once; those that this version does not know are left out."""
    wanted = set(names)
    return tuple(protocol for protocol in Protocol if protocol in wanted)


def scopes_of(node_id: str, protocols: Iterable[Protocol]) -> tuple[str, ...]:
    """What the node listens to. WireGuard has no logins that are the same on every node."""
    shared = [desired.protocol_scope(protocol) for protocol in protocols if protocol is not Protocol.WIREGUARD]
    return (desired.node_scope(node_id), *shared)


def _host_key(text: str) -> str | None:
    """None for a type that this version does not know, or for what no line of known_hosts should have."""
    try:
        return parse_ssh_key(text)
    except InvalidResource:
        return None
