"""The union of all scopes beside WireGuard: servers, logins, leases and ended sessions, and who may log in now: pure.

Of two scopes that ask for the same login or server the first by name has it, so that the outcome does not depend on
the order of arrival; the other one is reported.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol as Port

from shared.access import Credential, Lease, SessionEnd
from shared.desired import Kind, Payload
from shared.resource import Protocol
from shared.services import L2tpServer, OpenVpnServer, Server, SshServer

Name = tuple[str, str]  # kind, key

SERVER_KINDS = {
    Protocol.OPENVPN: Kind.OPENVPN_SERVER,
    Protocol.SSH: Kind.SSH_SERVER,
    Protocol.L2TP: Kind.L2TP_SERVER,
}
LEASE_ENDED = "its lease has ended"
ALLOWANCE_SPENT = "its allowance is used up"


class HasOthers(Port):
    @property
    def others(self) -> Mapping[Name, Payload]: ...


class Logins:
    """`credentials` are those that the host must let in now, by protocol and user name."""

    def __init__(self, scopes: Mapping[str, HasOthers], now: float, spent: Collection[int] = frozenset()) -> None:
        self.servers: dict[Protocol, Server] = {}
        self.credentials: dict[Protocol, dict[str, Credential]] = {protocol: {} for protocol in SERVER_KINDS}
        self.leases: dict[int, Lease] = {}
        self.ends: set[str] = set()
        self._scopes, self._spent = scopes, spent
        self._order = sorted(scopes)
        self._barred: dict[Name, str] = {}
        self._shadowed: dict[str, dict[Name, str]] = {name: {} for name in scopes}
        self._expiries: list[tuple[int, Name]] = []  # heap; an entry may be of an older version of the credential
        self.refresh((name for scope in scopes.values() for name in scope.others), now)

    def owner(self, name: Name) -> str | None:
        return next((scope for scope in self._order if name in self._scopes[scope].others), None)

    def find(self, protocol: Protocol, username: str) -> Credential | None:
        """The login that is asked for, also one that may not be used now."""
        if (credential := self.credentials[protocol].get(username)) is not None:
            return credential
        name = (str(Kind.CREDENTIAL), f"{protocol}/{username}")
        owner = self.owner(name)
        payload = self._scopes[owner].others[name] if owner is not None else None
        return payload if isinstance(payload, Credential) else None

    def barrier(self, protocol: Protocol, username: str) -> str | None:
        """Why a login that is asked for may not be used now."""
        return self._barred.get((str(Kind.CREDENTIAL), f"{protocol}/{username}"))

    def scopes_with(self, protocol: Protocol) -> set[str]:
        """The scopes that ask for the server or a login of this protocol."""
        server, login = SERVER_KINDS[protocol], f"{protocol}/"
        return {
            scope
            for scope, held in self._scopes.items()
            if any(kind == server or (kind == Kind.CREDENTIAL and key.startswith(login)) for kind, key in held.others)
        }

    def refresh(self, names: Iterable[Name], now: float) -> None:
        """Take in what the scopes have under these names; the cost is that of the names."""
        for name in names:
            holders = [scope for scope in self._order if name in self._scopes[scope].others]
            self._set(name, self._scopes[holders[0]].others[name] if holders else None, now)
            for scope, shadowed in self._shadowed.items():
                shadowed.pop(name, None)
                if scope in holders[1:] and name[0] not in (Kind.LEASE, Kind.SESSION_END):
                    shadowed[name] = f"{holders[0]} asks for the same"

    def expire(self, now: float) -> set[Name]:
        """Bar the logins whose lease has ended."""
        due = set()
        while self._expiries and self._expiries[0][0] <= now:
            due.add(heapq.heappop(self._expiries)[1])
        self.refresh(due, now)
        return {name for name in due if name in self._barred}

    def revive(self, now: float) -> set[Name]:
        """Let in again those whose reason to be barred is gone: a new lease, or a clock that had been ahead."""
        waiting = set(self._barred)
        self.refresh(waiting, now)
        return waiting - self._barred.keys()

    def bar(self, accounts: Collection[int], now: float) -> set[Name]:
        """Look again at the logins of accounts whose allowance has been used up."""
        names = {
            (str(Kind.CREDENTIAL), credential.key)
            for logins in self.credentials.values()
            for credential in logins.values()
            if credential.account in accounts
        }
        self.refresh(names, now)
        return names

    def next_expiry(self) -> int | None:
        return self._expiries[0][0] if self._expiries else None

    def refusals(self, scope: str) -> dict[Name, str]:
        barred = {name: words for name, words in self._barred.items() if self.owner(name) == scope}
        return self._shadowed[scope] | barred

    def _set(self, name: Name, payload: Payload | None, now: float) -> None:
        kind, key = name
        match kind:
            case Kind.CREDENTIAL:
                self._set_credential(name, payload, now)
            case Kind.OPENVPN_SERVER | Kind.SSH_SERVER | Kind.L2TP_SERVER:
                protocol = Protocol(kind.removesuffix(".server"))
                self.servers.pop(protocol, None)
                if isinstance(payload, OpenVpnServer | SshServer | L2tpServer):
                    self.servers[protocol] = payload
            case Kind.LEASE:
                if isinstance(payload, Lease):
                    self.leases[payload.account] = payload
                elif key.isdecimal():
                    self.leases.pop(int(key), None)
            case Kind.SESSION_END:
                self.ends.discard(key)
                if isinstance(payload, SessionEnd):
                    self.ends.add(key)

    def _set_credential(self, name: Name, payload: Payload | None, now: float) -> None:
        protocol, _, username = name[1].partition("/")
        logins = next((found for known, found in self.credentials.items() if known == protocol), {})
        self._barred.pop(name, None)
        logins.pop(username, None)
        if not isinstance(payload, Credential):
            return
        if payload.not_after is not None and payload.not_after <= now:
            self._barred[name] = LEASE_ENDED
        elif payload.limits.metered and payload.account in self._spent:
            self._barred[name] = ALLOWANCE_SPENT
        else:
            logins[username] = payload
            if payload.not_after is not None:
                heapq.heappush(self._expiries, (payload.not_after, name))
