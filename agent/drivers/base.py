"""The ports between the agent's rules and the host, and the errors that cross them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared import resource
from shared.access import Credential
from shared.desired import Interface, Peer
from shared.keys import PrivateKey
from shared.protocol import PeerStats
from shared.services import Server


class DriverError(Exception):
    """The host refused or failed; the text is the host's own words and names no secret."""


class DeviceMissing(DriverError):
    """The interface is not there (any more)."""


class Unsupported(DriverError):
    """This host cannot do it at all (no kernel module, no program)."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the host really has of one WireGuard interface."""

    name: str
    public_key: bytes  # 32 bytes; b"" where no private key is set
    listen_port: int  # 0 while the interface is down: it listens nowhere
    addresses: tuple[str, ...]  # address/prefix, without link-local ones
    mtu: int
    generation: str  # changes whenever the interface was created anew, and its counters started at 0
    peers: tuple[Peer, ...]  # as Peer.digest() compares them; not_after is always None


class WireGuardDriver(Protocol):
    """One host's WireGuard interfaces. All methods raise DriverError; calls for one interface never overlap.

    `observe` reads the host, it never answers from a cache. `apply_peers` and `remove_peers` send exactly what they
    are given, removals first where both are wanted by the caller; a live peer's endpoint and counters survive.
    """

    @property
    def backend(self) -> str:
        """kernel | userspace, as Hello tells the controller."""
        ...

    async def observe(self, name: str) -> Device | None:
        """Read the interface and all its peers, or None where there is none."""
        ...

    async def fingerprint(self, name: str) -> bytes | None:
        """A hash of all that `observe` would tell, read from the host at a fraction of its cost; None as there.

        Two equal ones mean that nothing but counters, handshakes and endpoints has changed.
        """
        ...

    async def ensure(self, spec: Interface, private_key: PrivateKey) -> None:
        """Create the interface or adopt the one that runs, then set key, port, addresses and MTU where they differ.

        An adopted interface gets its generation here: read it afterwards. Port 0 leaves the port to the host.
        """
        ...

    async def apply_peers(self, name: str, peers: Sequence[Peer]) -> None:
        """Add the peers, or set those that exist to exactly this (allowed IPs replaced)."""
        ...

    async def remove_peers(self, name: str, public_keys: Sequence[bytes]) -> None:
        """Remove the peers; one that is not there is no error."""
        ...

    async def stats(self, name: str) -> list[PeerStats]:
        """Read the counters of all peers."""
        ...

    async def remove(self, name: str) -> None:
        """Delete the interface; none there is no error."""
        ...

    async def close(self) -> None:
        """Let go of sockets; what runs on the host stays."""
        ...


@dataclass(frozen=True, slots=True)
class LiveSession:
    """A session as the host shows it. `id` is the same after a restart of the agent, and never names another one."""

    id: str
    username: str  # of the credential
    remote: str  # host:port of the client
    address: str  # inside the tunnel, "" where there is none
    since: int  # Unix seconds
    rx: int  # bytes from the client
    tx: int  # bytes to the client
    interface: str = ""  # of this session alone (a ppp or tun device)
    uid: int | None = None  # of the user whose processes carry the traffic, where no address does (SSH)
    ended: int = 0  # Unix seconds, 0 = it lives
    reason: str = ""
    address6: str = ""  # its IPv6 address inside the tunnel


Admit = Callable[[str], str | None]
"""Asked with a user name when a client wants in: None lets it, else the reason for refusing it."""

Notify = Callable[[], None]
"""Something happened that nobody asked for: a session began or ended, the server failed. Cheap: looks come later."""


class ServiceDriver(Protocol):
    """One protocol's server on the host. All methods raise DriverError; calls never overlap.

    A starting driver adopts the server that runs: its sessions go on.
    """

    @property
    def protocol(self) -> resource.Protocol: ...

    async def ensure(self, spec: Server) -> None:
        """Start the server with these settings, adopt the one that runs with them, restart one that has others.

        New settings are checked by the server's own parser before anything changes. Cheap where nothing differs: it
        is also the periodic re-check, and raises what is wrong with a server that died and cannot be started again.
        """
        ...

    async def stop(self) -> None:
        """End the server with all its sessions, and take its files away; none there is no error."""
        ...

    async def credentials(self) -> Mapping[str, Credential]:
        """Read back what the host would let in, by user name, as `Credential.digest` compares them.

        Read from the host, never from a cache, where the host holds them; account and limits mean nothing here.
        """
        ...

    async def put(self, credentials: Sequence[Credential]) -> dict[str, str]:
        """Add or change logins; return those that the host refused, each with its words. Live sessions go on."""
        ...

    async def remove(self, usernames: Sequence[str]) -> dict[str, str]:
        """Take logins away and end their sessions: after the return nobody is in by them. Unknown ones are no error."""
        ...

    async def sessions(self) -> list[LiveSession]:
        """All live sessions, and once each (with `ended`) those that ended since the last call, with final counters."""
        ...

    async def kick(self, session_id: str) -> None:
        """End one session now; one that is not there is no error."""
        ...

    async def close(self) -> None:
        """Let go of sockets and files; the server and its sessions stay."""
        ...


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the kernel has to enforce for one account's live sessions."""

    account: int
    addresses: tuple[str, ...] = ()  # inside the tunnels, without prefix length
    uids: tuple[int, ...] = ()  # of its SSH logins
    rate_up: int = 0  # bits per second from the client, 0 = no limit
    rate_down: int = 0
    remaining: int | None = None  # bytes that may still pass in both directions together; None = not metered
    grant: int = 0  # `remaining` is counted from the moment at which this number was seen first


class LimitsDriver(Protocol):
    """Speed limits and byte allowances in the kernel, exact between two looks of the agent. Raises DriverError."""

    async def apply(self, accounts: Sequence[Allowed]) -> None:
        """Enforce exactly these; the cost is that of what changed. An account whose `grant` is the same keeps what
        the kernel has counted for it."""
        ...

    async def close(self) -> None:
        """Let go of the host; the limits stay."""
        ...


@dataclass(frozen=True, slots=True)
class Tunnels:
    """Addresses of clients that come by other protocols than WireGuard: one server's pool."""

    name: str  # for messages
    networks: tuple[str, ...]  # 10.70.0.0/17
    masquerade: bool = True
    isolate: bool = True
    devices: str = ""  # what the names of the clients' devices begin with, where no program checks what comes from them


class FirewallDriver(Protocol):
    """The agent's own packet filter table: NAT, forwarding, isolation. Other tables are never touched."""

    async def observe(self) -> str | None:
        """The fingerprint of the loaded table, read from the host, or None where it is not there.

        Compare it with the one observed right after `apply`: another one means that somebody changed the table.
        """
        ...

    async def apply(self, interfaces: Sequence[Interface], tunnels: Sequence[Tunnels] = ()) -> None:
        """Replace the whole table in one transaction, and turn forwarding on where it is needed."""
        ...

    async def close(self) -> None:
        """Let go of the host; the rules stay."""
        ...
