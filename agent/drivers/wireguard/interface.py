"""What an interface has in both kinds of WireGuard: the tag of its creation, addresses, MTU, being up."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from hashlib import blake2b
from ipaddress import ip_interface

from agent.drivers.base import DriverError
from agent.drivers.netlink.rtnl import Link, Rtnl
from shared.desired import Interface

# The generation is a random tag in the interface's alias (`ip link show`): it lives exactly as long as the interface
# and its counters, survives the agent, and is never given to the next interface of the same name or index.
_TAG = re.compile(r"skynetvpn:([0-9a-f]{16})\b")
_MAX_ALIAS = 255


def new_tag() -> str:
    return f"skynetvpn:{secrets.token_hex(8)}"


def generation(link: Link) -> str:
    """The tag; an interface that nobody has adopted yet (`settle`) has none and answers with its index."""
    tag = _TAG.search(link.alias)
    return tag[1] if tag else f"index-{link.index}"


def fingerprint(link: Link, addresses: Sequence[str], rest: bytes) -> bytes:
    """The hash of what both kinds have in common, and of the rest."""
    common = repr((link.index, link.alias, link.mtu, link.up, addresses))
    return blake2b(common.encode() + rest, digest_size=16).digest()


async def find(rtnl: Rtnl, name: str, kind: str) -> Link | None:
    """Look the interface up; raise DriverError where something else has its name."""
    link = await rtnl.link(name)
    if link is not None and link.kind != kind:
        raise DriverError(
            f"{name} is there already, but as an interface of kind {link.kind or 'unknown'!r} instead of {kind!r}: "
            "delete it, use another name, or choose the other WireGuard backend"
        )
    return link


async def require(rtnl: Rtnl, name: str, kind: str) -> Link:
    link = await find(rtnl, name, kind)
    if link is None:
        raise DriverError(f"{name} disappeared as soon as it was created")
    return link


async def settle(rtnl: Rtnl, link: Link, spec: Interface) -> None:
    """Tag the interface where it has none, and set MTU and addresses where they differ."""
    if not _TAG.search(link.alias):
        words = f"{link.alias} " if link.alias else ""
        tag = new_tag()
        await rtnl.set_alias(link, words[: _MAX_ALIAS - len(tag)] + tag)
    if link.mtu != spec.mtu:
        await rtnl.set_mtu(link, spec.mtu)
    wanted = [str(ip_interface(address)) for address in spec.addresses]
    for address in await rtnl.addresses(link):
        if address not in wanted:
            await rtnl.delete_address(link, address)
    present = await rtnl.addresses(link)  # read again: the kernel takes secondary addresses away with their primary one
    for address in wanted:
        if address not in present:
            await rtnl.add_address(link, address)
