"""Desired state and host side by side: makes the host so, and keeps count of what it really has."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from agent.counters import Counters
from agent.desired import Change, Desired, Name
from agent.drivers.base import Device, DriverError
from agent.host import Host
from agent.plan import Action, EnsureInterface, RemovePeer, SetPeer, plan, steps
from agent.services import Services
from shared.desired import Kind, Peer, digest_bytes
from shared.keys import encode_key
from shared.protocol import Applied, Drift, Failure, PeerStats

_MAX_FAILURES = 5000  # in one answer; with the longest texts it still fits a frame
_MAX_WORDS = 500
_CHEAP_READING = 1000  # peers that are read whole for the last bytes of one

Farewell = Callable[[list[PeerStats], Mapping[bytes, Peer]], Awaitable[None]]

log = structlog.get_logger()


class Convergence:
    """The caller sees to it that its methods never overlap."""

    def __init__(self, host: Host, counters: Counters, desired: Desired, services: Services) -> None:
        self.desired = desired
        self.prune = False  # until the first sync nothing is removed from the host
        self.generation = ""
        self.farewell: Farewell | None = None  # told the last counters of peers that are about to be removed
        self._host, self._counters, self._services = host, counters, services
        self._proven: bytes | None = None  # the host's fingerprint when it was seen to be exactly as desired
        self._running = ""  # the interface that this process has set up
        self._down: str | None = None  # why no peer can be on the host at all
        self._faults: dict[str, dict[Name, str]] = {}
        self._totals: dict[str, int] = {}

    async def become(self, desired: Desired) -> None:
        """Take over the new desired state as a whole."""
        before, self.desired = self.desired, desired
        self._proven = None
        self._services.become(desired.logins, prune=self.prune)
        old, new = before.interface, desired.interface
        if self.prune and old is not None and self._running == old.name and (new is None or new.name != old.name):
            try:
                await self._part(old.name, before.peers)
                await self._host.remove(old.name)
                log.info("interface_removed", interface=old.name)
            except DriverError as error:
                log.error("interface_not_removed", interface=old.name, error=str(error))
            self._running = ""
        await self.converge(before)

    async def converge(self, before: Desired | None = None) -> list[Action]:
        """Read the host, do what is missing, read it back, and count what it has; return what was done."""
        spec, failed, actions = self.desired.interface, dict[bytes, str](), list[Action]()
        unprotected = None
        self._down = None
        if spec is None:
            self._down = "the node has no WireGuard interface yet"
            self._count(failed, None)
            return actions
        try:
            unprotected = await self.protect()
            device = await self._host.observe(spec.name)
            actions = self._plan(device)
            if actions:
                leaving = [action.public_key for action in actions if isinstance(action, RemovePeer)]
                if before is not None and leaving:
                    await self._part(spec.name, {key: before.peers[key] for key in leaving if key in before.peers})
                failed = await self._host.carry_out(spec.name, actions)
                device = await self._host.observe(spec.name)
                for action in self._plan(device):
                    self._still_to_do(action, failed)
            self._running, self.generation = spec.name, device.generation if device is not None else ""
        except DriverError as error:
            self._down = f"interface {spec.name}: {error}"
        self._count(failed, unprotected)
        log_actions(actions)
        return actions

    async def apply(self, change: Change) -> list[Action]:
        """Do a small change on a host that is as desired otherwise; the cost is that of the change.

        Return what was done and not yet logged.
        """
        spec = self.desired.interface
        if not change.withdrawn and not change.admitted:
            self.settle()
            return []
        self._proven = None
        if spec is None or self._down is not None:
            return []  # the change is desired now, and waits with all the others for the interface
        retry = [key for key, (name, old) in change.withdrawn.items() if self._fault(name, old) is not None]
        actions = steps(change, retry)
        try:
            leaving = {key: peer for key, (_, peer) in change.withdrawn.items() if key not in change.admitted}
            await self._part(spec.name, leaving)
            failed = await self._host.carry_out(spec.name, actions)
        except DriverError as error:
            log.warning("interface_lost", interface=spec.name, error=str(error))
            await self.converge()
            return []
        self._account(change, failed)
        return actions

    async def _part(self, interface: str, leaving: Mapping[bytes, Peer]) -> None:
        """Read the last counters of peers that are about to go.

        An interface is read as a whole only: where it is large, no client waits for that unless bytes are rationed.
        """
        rationed = any(peer.limits is not None and peer.limits.metered for peer in leaving.values())
        dear = len(self.desired.peers) > max(_CHEAP_READING, 100 * len(leaving))
        if not leaving or self.farewell is None or (dear and not rationed):
            return
        with contextlib.suppress(DriverError):  # they go all the same
            last = [stats for stats in await self._host.stats(interface) if stats.public_key in leaving]
            await self.farewell(last, leaving)

    async def untouched(self) -> bool:
        """Whether the host is exactly as desired; it costs one reading and no message."""
        spec = self.desired.interface
        assert spec is not None
        try:
            if (words := await self.protect()) is not None:
                raise DriverError(words)
            seen = await self._host.fingerprint(spec.name)
            if seen is not None and seen == self._proven:
                return True
            device = await self._host.observe(spec.name)
            same = not self._plan(device) and device is not None and device.generation == self.generation
            self._proven = seen if same and seen == await self._host.fingerprint(spec.name) else None
        except DriverError:
            return False
        return same

    async def impact(self, wanted: Desired, *, prune: bool) -> tuple[int, int]:
        """How many peers and logins of this node `wanted` would remove, and how many it has: stored for it, or on the
        host where what nobody asked for would be removed."""
        removes, there = self._services.impact(wanted.logins)
        present = set(self.desired.peers)
        spec = self.desired.interface or wanted.interface
        if spec is not None and prune:
            with contextlib.suppress(DriverError):
                device = await self._host.observe(spec.name)
                present.update(peer.public_key for peer in (device.peers if device is not None else ()))
        if wanted.interface is None:
            return removes + len(present), there + len(present)
        return removes + sum(key not in wanted.peers for key in present), there + len(present)

    def drifts(self, actions: Sequence[Action]) -> list[Drift]:
        """What a re-check found, by the scope it belongs to."""
        found: dict[str, dict[str, int]] = {}
        for action in actions:
            match action:
                case SetPeer():
                    name = self.desired.scope_name(action.peer.public_key)
                    what = "missing" if action.new else "changed"
                case _:  # the interface, or a peer that nobody asked for: the scope that names the interface
                    name = self.desired.owner
                    what = "unexpected" if isinstance(action, RemovePeer) else "changed"
            if name is not None:
                counts = found.setdefault(name, {"missing": 0, "unexpected": 0, "changed": 0})
                counts[what] += 1
        return [Drift(scope=name, **counts) for name, counts in found.items()]

    def applied(self, name: str) -> Applied:
        failures = [Failure(kind, key, words[:_MAX_WORDS]) for (kind, key), words in self._failures(name).items()]
        scope = self.desired.scopes[name]
        return Applied(
            scope=name,
            revision=scope.revision,
            digest=digest_bytes(self._totals.get(name, 0) + scope.stored + self._services.total(name)),
            failures=failures[:_MAX_FAILURES],
        )

    def failing(self) -> bool:
        """Whether a driver failed; what was refused as wrong does not get better by trying again."""
        return any(self._faults.values()) or (self._down is not None and self.desired.interface is not None)

    def _plan(self, device: Device | None) -> list[Action]:
        spec = self.desired.interface
        assert spec is not None
        return plan(device, spec, self.desired.peers, public_key=self._host.public_key, prune=self.prune)

    async def protect(self) -> str | None:
        """Load the packet filter; where that fails the tunnels go on, and the words are for the report."""
        tunnels = self._services.tunnels()
        if self.desired.interface is None and not tunnels:
            return None
        try:
            if await self._host.protect(self.desired.interface, tunnels):
                self._counters.drift += 1
                log.warning("firewall_healed")
        except DriverError as error:
            return f"packet filter: {error}"
        return None

    @staticmethod
    def _still_to_do(action: Action, failed: dict[bytes, str]) -> None:
        match action:
            case EnsureInterface():
                raise DriverError(f"it was set up, and yet {action.reason}")
            case SetPeer():
                failed.setdefault(action.peer.public_key, "it was set, and yet the host shows something else")
            case RemovePeer():
                failed.setdefault(action.public_key, "it was removed, and yet the host has it")

    def _count(self, failed: dict[bytes, str], unprotected: str | None) -> None:
        """Set faults and digests of all scopes from what the host was seen to have."""
        self._faults = {name: {} for name in self.desired.scopes}
        self._totals = dict.fromkeys(self.desired.scopes, 0)
        spec = self.desired.interface
        for name, scope in self.desired.scopes.items():
            if spec is not None and name == self.desired.owner:
                if self._down or unprotected:
                    self._faults[name][Kind.WIREGUARD_INTERFACE, spec.name] = self._down or unprotected or ""
                else:  # as the scope has it: imported addresses beside it are nobody's
                    self._totals[name] += scope.interfaces[spec.name].digest()
            for key, peer in scope.peers.items():
                if self.desired.peers.get(key) is not peer or self._down:
                    continue
                if key in failed:
                    self._faults[name][Kind.WIREGUARD_PEER, peer.key] = failed[key]
                else:
                    self._totals[name] += peer.digest()
        owner = self.desired.owner
        for key in failed.keys() - self.desired.peers.keys():
            if owner is not None:  # it could not be removed, and belongs to no scope any more
                self._faults[owner][Kind.WIREGUARD_PEER, encode_key(key)] = failed[key]
        self.settle()

    def _account(self, change: Change, failed: dict[bytes, str]) -> None:
        for key, (name, old) in change.withdrawn.items():
            if self._faults[name].pop((Kind.WIREGUARD_PEER, old.key), None) is None:
                self._totals[name] -= old.digest()
            if key in failed and key not in change.admitted:
                self._faults[name][Kind.WIREGUARD_PEER, old.key] = failed[key]
        for key, (name, new) in change.admitted.items():
            if key in failed:
                self._faults[name][Kind.WIREGUARD_PEER, new.key] = failed[key]
            else:
                self._faults[name].pop((Kind.WIREGUARD_PEER, new.key), None)
                self._totals[name] += new.digest()
        self.settle()

    def settle(self) -> None:
        self._counters.failures = sum(len(self._failures(name)) for name in self.desired.scopes)
        self._counters.peers = 0 if self._down else len(self.desired.peers)

    def _failures(self, name: str) -> dict[Name, str]:
        failures = self.desired.refusals(name) | self._faults.get(name, {}) | self._services.failures(name)
        if self._down is not None:
            for key, peer in self.desired.scopes[name].peers.items():
                if self.desired.peers.get(key) is peer:
                    failures[Kind.WIREGUARD_PEER, encode_key(key)] = self._down
        return failures

    def _fault(self, name: str, peer: Peer) -> str | None:
        return self._faults.get(name, {}).get((Kind.WIREGUARD_PEER, peer.key))


def log_actions(actions: Sequence[Action], reason: str = "") -> None:
    if len(actions) <= 5:
        for action in actions:
            log.info("applied", action=str(action), reason=reason)
    else:
        log.info("applied", actions=len(actions), first=str(actions[0]), reason=reason)
