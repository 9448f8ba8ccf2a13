"""What accounts may do on this node over all protocols together: who may come in, who has to go, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.allowances import Allowances
from agent.drivers.base import Allowed
from agent.grants import Grants
from agent.reconciler import Reconciler
from agent.reporter import Reporter
from agent.sessionlog import SessionLog
from shared.access import NO_LIMITS, Credential, Limits
from shared.protocol import SessionStats
from shared.resource import Protocol

ORDERED = "the controller ended it"


@dataclass(slots=True)
class _Use:
    """What one account has on this node."""

    limits: Limits
    addresses: list[str] = field(default_factory=list)
    uids: set[int] = field(default_factory=set)


class Rights:
    def __init__(
        self, reconciler: Reconciler, reporter: Reporter, sessions: SessionLog, allowances: Allowances
    ) -> None:
        self._reconciler, self._reporter = reconciler, reporter
        self._sessions, self._allowances = sessions, allowances
        self._grants = Grants(allowances)

    def credential(self, protocol: Protocol, username: str) -> Credential | None:
        return self._reconciler.logins.find(protocol, username)

    def admit(self, protocol: Protocol, username: str) -> str | None:
        """Why this login may not begin a session now; None = it may."""
        credential = self._reconciler.logins.credentials[protocol].get(username)
        if credential is None:
            return self._reconciler.logins.barrier(protocol, username) or "there is no such login"
        most = credential.limits.max_sessions
        if not most:
            return None
        account = credential.account
        live = self._sessions.count(account) + len(self._reporter.connected({account}))
        return too_many(most) if live >= most else None

    def condemned(self, protocol: Protocol) -> dict[str, str]:
        """The live sessions of this protocol that must end, each with the reason. Of too many the newest go."""
        ends, found = self._reconciler.logins.ends, dict[str, str]()
        crowds: dict[int, tuple[int, list[tuple[int, str, str]]]] = {}
        for session in self._sessions.live():
            if session.id in ends and session.protocol == protocol:
                found[session.id] = ORDERED
            elif most := self._limits(session).max_sessions:
                crowd = crowds.setdefault(session.account, (most, []))[1]
                crowd.append((session.since, session.id, session.protocol))
        if not crowds:
            return found
        for account, since in self._reporter.connected(crowds.keys()):
            crowds[account][1].append((since, "", Protocol.WIREGUARD))
        for most, crowd in crowds.values():
            found |= {key: too_many(most) for _, key, of in sorted(crowd)[most:] if of == protocol}
        return found

    def allowed(self, uids: Mapping[str, int], second: Mapping[str, str]) -> list[Allowed]:
        """What the kernel has to enforce. `uids` has those of sessions whose traffic has no address of its own,
        `second` the IPv6 addresses of sessions that have one, too."""
        uses: dict[int, _Use] = {}
        for peer in self._reconciler.peers.values():
            if peer.account and peer.limits is not None and _enforced(peer.limits):
                use = uses.setdefault(peer.account, _Use(peer.limits))
                use.addresses += [prefix.partition("/")[0] for prefix in peer.allowed_ips]
        for session in self._sessions.live():
            limits = self._limits(session)
            if session.account and _enforced(limits):
                use = uses.setdefault(session.account, _Use(limits))
                use.addresses += [each for each in (session.address, second.get(session.id)) if each]
                use.uids |= {uids[session.id]} if session.id in uids else set()
        return [
            Allowed(
                account=account,
                addresses=tuple(use.addresses),
                uids=tuple(sorted(use.uids)),
                rate_up=use.limits.rate_up,
                rate_down=use.limits.rate_down,
                remaining=self._allowances.remaining(account),
                grant=self._grants.number(account),
            )
            for account, use in sorted(uses.items())
        ]

    def _limits(self, session: SessionStats) -> Limits:
        credential = self.credential(Protocol(session.protocol), session.username)
        return credential.limits if credential is not None else NO_LIMITS


def too_many(most: int) -> str:
    return f"the account may have {most} sessions at a time"


def _enforced(limits: Limits) -> bool:
    return limits.metered or bool(limits.rate_up or limits.rate_down)
