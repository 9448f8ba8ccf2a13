"""The union of all scopes in memory, and which of its resources may be on this host: pure.

Everything is checked here once more although the controller has done so: a peer with a wide prefix, the node's own
address or an address of another peer would take over traffic, whoever asked for it. What is refused is reported, the
rest is applied. Of two peers that exclude each other the one that was there first stays.

An imported interface is never given up: the controller's must be the same one (name and port), and then has the
imported addresses beside its own. Until it is, nothing of the controller is on the host.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network

from msgspec.structs import replace

from agent.logins import ALLOWANCE_SPENT, LEASE_ENDED, Logins
from agent.logins import Name as Name
from shared.access import Credential
from shared.desired import Interface, Kind, Payload, Peer, decode
from shared.keys import decode_key, encode_key
from shared.protocol import Resource

# The interface and peers of an adopted wg-quick file: the controller does not know them, only an operator removes them.
IMPORTED = "imported"

_STORED = (Kind.LEASE, Kind.SESSION_END)  # the host shows nothing of them: they are the agent's own


@dataclass(slots=True)
class Scope:
    epoch: str
    revision: int
    interfaces: dict[str, Interface] = field(default_factory=dict)
    peers: dict[bytes, Peer] = field(default_factory=dict)
    others: dict[Name, Payload] = field(default_factory=dict)  # of all other kinds
    invalid: dict[Name, str] = field(default_factory=dict)
    stored: int = 0  # the sum of the digests of what counts by being stored

    def put(self, resource: Resource) -> Payload | None:
        """Take the resource in; one that no host should apply is only noted."""
        name = (resource.kind, resource.key)
        self.discard(name)
        try:
            payload = decode(resource.kind, resource.key, resource.payload)
        except ValueError as error:
            self.invalid[name] = str(error)
            return None
        if isinstance(payload, Interface):
            self.interfaces[payload.name] = payload
        elif isinstance(payload, Peer):
            self.peers[payload.public_key] = payload
        else:
            self.others[name] = payload
            if resource.kind in _STORED:
                self.stored += payload.digest()
        return payload

    def discard(self, name: Name) -> None:
        kind, key = name
        self.invalid.pop(name, None)
        if kind == Kind.WIREGUARD_INTERFACE:
            self.interfaces.pop(key, None)
        elif kind == Kind.WIREGUARD_PEER:
            self.peers.pop(_raw(key), None)
        elif (gone := self.others.pop(name, None)) is not None and kind in _STORED:
            self.stored -= gone.digest()


def scope_of(epoch: str, revision: int, resources: Iterable[Resource]) -> Scope:
    scope = Scope(epoch, revision)
    for resource in resources:
        scope.put(resource)
    return scope


@dataclass(frozen=True, slots=True)
class Change:
    """What left the desired peers and what came, each with its scope; a changed peer is in both.

    `others` are the resources of all other kinds that were touched, `accounts` the metered ones that may be concerned.
    """

    withdrawn: dict[bytes, tuple[str, Peer]] = field(default_factory=dict)
    admitted: dict[bytes, tuple[str, Peer]] = field(default_factory=dict)
    others: set[Name] = field(default_factory=set)
    accounts: set[int] = field(default_factory=set)

    def then(self, later: Change) -> None:
        """Take in a change that came after this one: together they are done in one step."""
        for key, entry in later.withdrawn.items():
            if self.admitted.pop(key, None) is None:
                self.withdrawn[key] = entry
        self.admitted.update(later.admitted)
        self.others.update(later.others)
        self.accounts.update(later.accounts)


class Desired:
    """`interface` and `peers` are what the host must have now; `owner` is the scope that names the interface.

    `spent` are the metered accounts that have used up their allowance; whoever changes it calls `bar` or `revive`.
    """

    def __init__(self, scopes: Mapping[str, Scope], now: float, spent: Collection[int] = frozenset()) -> None:
        self.scopes = dict(scopes)
        self.logins = Logins(self.scopes, now, spent)
        self.metered: dict[int, int] = {}  # account -> bytes that it may use without a lease
        self.version = 0  # counts the changes
        self._spent = spent
        self.peers: dict[bytes, Peer] = {}
        self.interface: Interface | None = None
        self.owner: str | None = None
        self._barred = False  # whether the imported interface is in the way of the controller's
        self._refused: dict[str, dict[Name, str]] = {name: {} for name in self.scopes}
        self._claims: dict[str, bytes] = {}  # allowed IP -> the peer that has it
        self._expired: dict[bytes, str] = {}
        self._leases: list[tuple[int, bytes]] = []  # heap; an entry may be of an older version of the peer
        for scope in self.scopes.values():
            for payload in (*scope.peers.values(), *scope.others.values()):
                self._meter(payload)
        self._choose_interface()
        self._own = _own_addresses(self.interface)
        for name, peer in self._all_peers():
            self._admit(name, peer, now)

    def with_scope(self, name: str, scope: Scope, now: float) -> Desired:
        return Desired({**self.scopes, name: scope}, now, self._spent)

    def without(self, names: Iterable[str], now: float) -> Desired:
        dropped = set(names)
        return Desired({name: scope for name, scope in self.scopes.items() if name not in dropped}, now, self._spent)

    def scope_name(self, public_key: bytes) -> str | None:
        """The scope that an admitted peer comes from."""
        peer = self.peers.get(public_key)
        return next((name for name, scope in self.scopes.items() if peer and scope.peers.get(public_key) is peer), None)

    def refusals(self, name: str) -> dict[Name, str]:
        """What this scope asks for and the host does not get, with the reason."""
        expired = {
            (str(Kind.WIREGUARD_PEER), encode_key(key)): self._end_of(self.scopes[scope].peers[key])
            for key, scope in self._expired.items()
            if scope == name
        }
        return self.scopes[name].invalid | self._refused[name] | expired | self.logins.refusals(name)

    def change(self, name: str, upserts: Sequence[Resource], removals: Sequence[Name], now: float) -> Change:
        """Change what one scope has, but for interfaces; the cost is that of the change, not of the scope."""
        change = Change()
        scope = self.scopes[name]
        for kind, key in [*removals, *((resource.kind, resource.key) for resource in upserts)]:
            self._refused[name].pop((kind, key), None)
            if kind == Kind.WIREGUARD_PEER:
                self._withdraw(name, scope.peers.get(_raw(key)), change)
            else:
                change.others.add((kind, key))
                if kind == Kind.LEASE and key.isdecimal():
                    change.accounts.add(int(key))
        for removal in removals:
            scope.discard(removal)
        for resource in upserts:
            payload = scope.put(resource)
            if (account := self._meter(payload)) is not None:
                change.accounts.add(account)
            if isinstance(payload, Peer):
                self._admit(name, payload, now, change)
        self.version += 1
        if change.others:
            self.logins.refresh(change.others, now)
        if change.withdrawn:
            self._reconsider(now, change)
        return change

    def expire(self, now: float) -> Change:
        """Withdraw the peers and logins whose lease has ended."""
        change = Change(others=self.logins.expire(now))
        while self._leases and self._leases[0][0] <= now:
            _, key = heapq.heappop(self._leases)
            peer, name = self.peers.get(key), self.scope_name(key)
            if peer is not None and name is not None and peer.not_after is not None and peer.not_after <= now:
                self._withdraw(name, peer, change)
                self._expired[key] = name
        if change.withdrawn:
            self._reconsider(now, change)
        return change

    def bar(self, accounts: Collection[int], now: float) -> Change:
        """Withdraw the peers and logins of accounts whose allowance has been used up."""
        change = Change(others=self.logins.bar(accounts, now))
        for peer in [peer for peer in self.peers.values() if peer.account in accounts and _metered(peer)]:
            if (name := self.scope_name(peer.public_key)) is not None:
                self._withdraw(name, peer, change)
                self._expired[peer.public_key] = name
        if change.withdrawn:
            self._reconsider(now, change)
        return change

    def revive(self, now: float) -> Change:
        """Admit again those that have a new lease, or had expired only because the clock was ahead."""
        change = Change(others=self.logins.revive(now))
        for key, name in list(self._expired.items()):
            peer = self.scopes[name].peers[key]
            if not self._has_ended(peer, now):
                del self._expired[key]
                self._admit(name, peer, now, change)
        return change

    def next_expiry(self) -> int | None:
        return min((first for first in (self.logins.next_expiry(), self._first_lease()) if first), default=None)

    def _meter(self, payload: Payload | None) -> int | None:
        """Note whether the account of this resource is metered; return the account where that may matter."""
        if not isinstance(payload, Peer | Credential) or payload.limits is None:
            return None
        if payload.limits.metered:
            self.metered[payload.account] = payload.limits.opening
        elif self.metered.pop(payload.account, None) is None:
            return None
        return payload.account

    def _first_lease(self) -> int | None:
        return self._leases[0][0] if self._leases else None

    def _has_ended(self, peer: Peer, now: float) -> bool:
        return (peer.not_after is not None and peer.not_after <= now) or (
            bool(self._spent) and peer.account in self._spent and _metered(peer)
        )

    def _end_of(self, peer: Peer) -> str:
        return ALLOWANCE_SPENT if peer.account in self._spent and _metered(peer) else LEASE_ENDED

    def _admit(self, name: str, peer: Peer, now: float, change: Change | None = None) -> None:
        if self._has_ended(peer, now):
            self._expired[peer.public_key] = name
            return
        reason = self._objection(name, peer)
        if reason is not None:
            self._refused[name][Kind.WIREGUARD_PEER, peer.key] = reason
            return
        self._refused[name].pop((Kind.WIREGUARD_PEER, peer.key), None)
        self.peers[peer.public_key] = peer
        for prefix in peer.allowed_ips:
            self._claims[prefix] = peer.public_key
        if peer.not_after is not None:
            heapq.heappush(self._leases, (peer.not_after, peer.public_key))
        if change is not None:
            change.admitted[peer.public_key] = (name, peer)

    def _objection(self, scope: str, peer: Peer) -> str | None:
        if self._barred and scope != IMPORTED:
            return "the node cannot have the controller's interface"
        if peer.public_key in self.peers:
            return f"the same public key is a peer of {self.scope_name(peer.public_key)}"
        if len(set(peer.allowed_ips)) != len(peer.allowed_ips):
            return "an allowed IP is listed twice"
        for prefix in peer.allowed_ips:
            if prefix in self._own:
                return f"{prefix} is an address of the node itself"
            if (holder := self._claims.get(prefix)) is not None:
                return f"{prefix} belongs to peer {self.peers[holder].key}"
        return None

    def _withdraw(self, name: str, peer: Peer | None, change: Change) -> None:
        if peer is None:
            return
        self._expired.pop(peer.public_key, None)
        if self.peers.get(peer.public_key) is peer:
            del self.peers[peer.public_key]
            for prefix in peer.allowed_ips:
                del self._claims[prefix]
            change.withdrawn[peer.public_key] = (name, peer)

    def _reconsider(self, now: float, change: Change) -> None:
        """Something was given up: perhaps a peer that had to be refused can have it now."""
        for name, refused in self._refused.items():
            for kind, key in list(refused):
                peer = self.scopes[name].peers.get(_raw(key)) if kind == Kind.WIREGUARD_PEER else None
                if peer is not None:
                    self._admit(name, peer, now, change)

    def _choose_interface(self) -> None:
        own = self.scopes.get(IMPORTED, Scope("", 0))
        kept = next(iter(own.interfaces.values()), None)
        wanted = [
            (name, interface)
            for name, scope in sorted(self.scopes.items())
            for _, interface in sorted(scope.interfaces.items())
            if name != IMPORTED
        ]
        for name, interface in wanted:
            words = None
            if self.interface is not None:
                words = f"the node runs {self.interface.name}, and one WireGuard interface is all it has"
            elif kept is not None:
                words = _hindrance(interface, kept, own.peers.values())
            if words is None:
                self.interface, self.owner = _joined(interface, kept), name
            else:
                self._refused[name][Kind.WIREGUARD_INTERFACE, interface.name] = words
        if self.interface is None and kept is not None:
            self.interface, self.owner, self._barred = kept, IMPORTED, bool(wanted)

    def _all_peers(self) -> Iterator[tuple[str, Peer]]:
        for name in sorted(self.scopes, key=lambda name: (name != IMPORTED, name)):
            for peer in self.scopes[name].peers.values():
                yield name, peer


def _hindrance(wanted: Interface, kept: Interface, peers: Iterable[Peer]) -> str | None:
    """Why the controller's interface cannot be the imported one, and what the operator can do; None where it can."""
    if (wanted.name, wanted.listen_port) != (kept.name, kept.listen_port):
        return (
            f"the node keeps the imported interface {kept.name} on port {kept.listen_port} for its clients, and cannot "
            f"have {wanted.name} on port {wanted.listen_port}: run skynetvpn-controller node token --name NAME "
            f"--country CC --city CITY --interface {kept.name} --port {kept.listen_port} on the controller; that "
            "changes the node, the token is not needed"
        )
    for peer in peers:
        if taken := _own_addresses(wanted).intersection(peer.allowed_ips):
            return f"{min(taken)} belongs to imported peer {peer.key}: give the controller another pool"
    return None


def _joined(wanted: Interface, kept: Interface | None) -> Interface:
    """The controller's interface with the imported addresses beside its own."""
    if kept is None:
        return wanted
    there = {ip_interface(address) for address in wanted.addresses}
    more = [address for address in kept.addresses if ip_interface(address) not in there]
    return replace(wanted, addresses=(*wanted.addresses, *more))


def _own_addresses(interface: Interface | None) -> frozenset[str]:
    addresses = interface.addresses if interface is not None else ()
    return frozenset(str(ip_network(ip_interface(address).ip)) for address in addresses)


def _metered(peer: Peer) -> bool:
    return peer.limits is not None and peer.limits.metered


def _raw(key: str) -> bytes:
    """The bytes of a peer's key; b"" (no peer has it) for text that is not one."""
    try:
        return decode_key(key)
    except ValueError:
        return b""
