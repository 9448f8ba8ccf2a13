"""Adopts an existing wg-quick file: its key, port and address, and its peers, so that nobody is cut off.

The peers go to a scope of their own (`imported`) in the stored state. The controller neither knows nor removes them;
they stay until an operator imports a file without them. The running interface is adopted as it is, and the controller
has to name it as its own; an allowed IP of an imported peer is refused to everybody else.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface, ip_network
from pathlib import Path
from typing import Any

from agent import files
from agent.desired import IMPORTED, Desired, scope_of
from agent.errors import AgentError
from agent.identity import WIREGUARD_KEY, Identity
from agent.state import State, StateError
from shared.desired import Interface, Kind, Peer, encode
from shared.keys import PresharedKey, PrivateKey, PublicKey
from shared.protocol import Resource

_TAKEN = {"privatekey", "listenport", "address", "mtu"}
_DEFAULT_MTU = 1420


@dataclass(frozen=True, slots=True)
class Found:
    interface: Interface
    private_key: PrivateKey
    peers: tuple[Peer, ...]
    ignored: tuple[str, ...]  # what the agent does not take over: settings of the file, addresses

    def describe(self) -> str:
        spec = self.interface
        lines = [
            f"interface {spec.name}: port {spec.listen_port}, {', '.join(spec.addresses)}, MTU {spec.mtu}",
            f"public key {self.private_key.public()}",
            f"{len(self.peers)} peers",
            *(f"  {peer.key}  {', '.join(peer.allowed_ips)}" for peer in self.peers),
        ]
        if self.ignored:
            lines.append(f"not taken over: {', '.join(self.ignored)}")
        return "\n".join(lines)


async def read(file: Path, interface: str | None = None) -> Found:
    """Read and check the whole file; raise AgentError with the file and line of what is wrong."""
    return await asyncio.to_thread(_read, file, interface or file.stem)


async def adopt(found: Found, directory: Path) -> None:
    """Store the key and the peers; the next start of the agent serves them."""
    files.make_private_directory(directory)
    with files.locked(directory):
        identity = Identity(directory)
        key = directory / WIREGUARD_KEY
        if identity.enrolled() and await asyncio.to_thread(identity.wireguard_key) != found.private_key:
            raise AgentError(
                f"this host is enrolled with another WireGuard key ({key}): import before enrolling, "
                "so that the controller learns the imported key"
            )
        payloads: list[Interface | Peer] = [found.interface, *found.peers]
        kinds = [Kind.WIREGUARD_INTERFACE] + [Kind.WIREGUARD_PEER] * len(found.peers)
        resources = [Resource(kind, item.key, encode(item)) for kind, item in zip(kinds, payloads, strict=True)]
        state = State(directory)
        try:
            await state.open()
            await state.replace(IMPORTED, "", 0, resources)
        except StateError as error:
            raise AgentError(str(error)) from error
        finally:
            await state.close()
        await asyncio.to_thread(identity.store_wireguard_key, found.private_key)
        await asyncio.to_thread(identity.public_key)


def _read(file: Path, name: str) -> Found:
    from wgconfig import WGConfig

    parser = WGConfig(str(file.absolute()))
    try:
        parser.read_file()
        parser.parse_lines()
        interface = _lowered(parser.get_interface())
        peers = parser.get_peers(keys_only=False, include_details=True)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise AgentError(f"{file} is not a wg-quick file: {error}") from error
    sections = sum(line.strip().lower().startswith("[peer]") for line in parser.lines)
    if sections != sum(not peer["_disabled"] for peer in peers.values()):
        raise AgentError(f"{file}: two [Peer] sections have the same PublicKey")
    spec, key = _interface(interface, name, file)
    found = tuple(_peer(_lowered(peer), f"{file}:{_line(peer)}") for peer in peers.values() if not peer["_disabled"])
    _check_together(spec, found, file)
    ignored = [name for name in interface if name not in _TAKEN]
    ignored += [address for address in _many(interface, "address") if _is_the_kernels(ip_interface(address))]
    return Found(spec, key, found, tuple(sorted(ignored)))


def _interface(values: dict[str, Any], name: str, file: Path) -> tuple[Interface, PrivateKey]:
    try:
        spec = Interface(
            name=name,
            listen_port=int(_one(values, "listenport")),
            addresses=tuple(
                str(address) for address in map(ip_interface, _many(values, "address")) if not _is_the_kernels(address)
            ),
            mtu=int(_one(values, "mtu", _DEFAULT_MTU)),
        )
        spec.check()
        return spec, PrivateKey.parse(str(_one(values, "privatekey")))
    except ValueError as error:
        raise AgentError(f"{file}: [Interface]: {error}") from error


def _is_the_kernels(address: IPv4Interface | IPv6Interface) -> bool:
    """A device of wireguard-go has a link-local one of itself, and `wg-quick save` writes it down; drivers see none."""
    return address.is_link_local


def _peer(values: dict[str, Any], where: str) -> Peer:
    try:
        preshared = values.get("presharedkey")
        keepalive = values.get("persistentkeepalive", 0)
        peer = Peer(
            public_key=PublicKey.parse(str(_one(values, "publickey"))).raw,
            allowed_ips=tuple(str(ip_network(prefix, strict=False)) for prefix in _many(values, "allowedips")),
            preshared_key=PresharedKey.parse(str(preshared)).raw if preshared else None,
            keepalive=0 if keepalive == "off" else int(keepalive),
        )
        peer.check()
    except ValueError as error:
        raise AgentError(f"{where}: {error}; nothing was imported") from error
    return peer


def _check_together(spec: Interface, peers: tuple[Peer, ...], file: Path) -> None:
    networks = [ip_interface(address).network for address in spec.addresses]
    for peer in peers:
        for prefix in peer.allowed_ips:
            if not any(ip_network(prefix).network_address in network for network in networks):
                raise AgentError(
                    f"{file}: peer {peer.key}: {prefix} is in no network of {', '.join(spec.addresses)}, so packets "
                    "from it would be dropped: write the Address with its whole network; nothing was imported"
                )
    scope = scope_of("", 0, [])
    scope.interfaces[spec.name] = spec
    scope.peers = {peer.public_key: peer for peer in peers}
    for (_, key), reason in Desired({IMPORTED: scope}, 0).refusals(IMPORTED).items():
        raise AgentError(f"{file}: peer {key}: {reason}; nothing was imported")


def _lowered(values: dict[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in values.items()}


def _line(peer: dict[str, Any]) -> int:
    """The line of the [Peer] header; comments in front of it belong to the section."""
    for offset, line in enumerate(peer["_rawdata"]):
        if line.strip().startswith("["):
            return int(peer["_index_firstline"]) + offset + 1
    return int(peer["_index_firstline"]) + 1


def _one(values: dict[str, Any], name: str, default: object = None) -> Any:
    value = values.get(name, default)
    if value is None:
        raise ValueError(f"{name} is missing")
    if isinstance(value, list):
        raise ValueError(f"{name} is there more than once")
    return value


def _many(values: dict[str, Any], name: str) -> list[str]:
    value = values.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
