"""Use cases of access: give an account its logins, change their password, bring the nodes to what it may do now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from controller.access import credentials
from controller.access.logins import Login
from controller.access.secrets import HASHED, Secrets, make_secrets
from controller.access.standing import Standing, standing_of
from controller.access.tables import CredentialRow
from controller.access.usernames import check_login
from controller.accounts import rows as accounts
from controller.accounts.passwords import Passwords
from controller.accounts.rows import User
from controller.errors import InvalidInput
from controller.store.database import Transaction
from shared.resource import Protocol

log = structlog.get_logger()

RefreshPeers = Callable[[Transaction, str, Standing], Awaitable[object]]


class Access:
    """The logins of accounts, one of each protocol, good on every node that offers it.

    They have the account's name and password. `refresh_peers(tx, user id, standing)` does for WireGuard what
    `refresh` does for logins. `tunnels` is how many addresses SSH has.
    """

    def __init__(
        self, passwords: Passwords, refresh_peers: RefreshPeers, *, tunnels: int = credentials.TUNNELS
    ) -> None:
        self._passwords = passwords
        self._refresh_peers = refresh_peers
        self._tunnels = tunnels

    async def prepare(self, password: str, protocols: Collection[str] | None = None) -> Secrets:
        """The slow part of a new password, outside of any transaction. Where the protocols that it is for are known,
        raise InvalidInput for a password that one of them cannot take."""
        wanted = _parse(protocols) if protocols is not None else set(Protocol)
        secrets = await make_secrets(self._passwords, password, hashed=not HASHED.isdisjoint(wanted))
        if protocols is not None:
            for protocol in sorted(wanted):
                _refuse("password", secrets.problem(protocol))
        return secrets

    async def grant(self, tx: Transaction, user_id: str, protocols: Collection[str], secrets: Secrets | None) -> None:
        """Make these the account's logins, and no others. WireGuard needs none.

        Without secrets those that are known stay. Raise InvalidInput that names `protocols`, `username` where no node
        can have a login of that name, and `password` where it does not fit or is needed.
        """
        wanted = _parse(protocols)
        user = await _user(tx, user_id)
        former = await _own(tx.session, user_id)
        problems: dict[str, str] = {}
        reason = check_login(user.username) if wanted - former.keys() else None
        if reason is not None:
            problems["username"] = f"{reason}, as a login of {', '.join(sorted(wanted - former.keys()))}"
        known = _known(tx, former)
        for protocol in sorted(wanted):
            unfit = secrets.problem(protocol) if secrets is not None else _missing(protocol, known)
            if unfit is not None:
                problems.setdefault("password", unfit)
        if problems:
            raise InvalidInput(problems)
        await credentials.delete(tx, [row for protocol, row in former.items() if protocol not in wanted])
        for protocol in sorted(wanted):
            secret = secrets.of(protocol) if secrets is not None else known[protocol]
            if protocol not in former:
                credentials.new(tx, user_id, Login(protocol=protocol, username=user.username, secret=secret))
            elif secrets is not None:
                credentials.set_secret(tx, former[protocol], secret)
        await self.refresh(tx, user_id)
        log.info("access.granted", user_id=user_id, protocols=sorted(wanted))

    async def change_password(self, tx: Transaction, user_id: str, prepared: Secrets) -> None:
        """Give the account's logins the new password; raise InvalidInput where one of them cannot take it.

        Those of protocols that it may no longer use are about to go.
        """
        user = await _user(tx, user_id)
        own = await _own(tx.session, user_id)
        for protocol in sorted(own if user.protocols is None else own.keys() & set(user.protocols)):
            _refuse("password", prepared.problem(protocol))
            credentials.set_secret(tx, own[protocol], prepared.of(protocol))
        if own:
            standing = await standing_of(tx.session, user)
            await credentials.bring(tx, list(own.values()), standing, self._tunnels)

    async def refresh(self, tx: Transaction, user_id: str) -> None:
        """Bring the nodes to what the account may do now. Where it is blocked, or may no longer use a protocol, its
        logins and peers go, those of its connections too; called when that has ended, this brings the same ones back.
        """
        user = await _user(tx, user_id)
        standing = await standing_of(tx.session, user)
        await credentials.bring(tx, await credentials.of_account(tx.session, user_id), standing, self._tunnels)
        await self._refresh_peers(tx, user_id, standing)

    async def end_account(self, tx: Transaction, user_id: str, reason: str) -> None:
        """Take the logins of an account that is deactivated or deleted off the nodes."""
        rows = await credentials.of_account(tx.session, user_id)
        await credentials.withdraw(tx, rows)
        log.info("access.ended", user_id=user_id, reason=reason, logins=len(rows))


async def _user(tx: Transaction, user_id: str) -> User:
    return accounts.user_from_row(await accounts.row(tx.session, user_id, lock=True))


async def _own(session: AsyncSession, user_id: str) -> dict[Protocol, CredentialRow]:
    rows = await credentials.of_account(session, user_id)
    return {Protocol(row.protocol): row for row in rows if row.connection_id is None}


def _refuse(field: str, reason: str | None) -> None:
    if reason is not None:
        raise InvalidInput({field: reason})


def _parse(protocols: Collection[str]) -> set[Protocol]:
    unknown = set(protocols) - set(Protocol)
    if unknown:
        raise InvalidInput({"protocols": f"are some of {', '.join(Protocol)}"})
    return {Protocol(name) for name in protocols} - {Protocol.WIREGUARD}


def _known(tx: Transaction, former: dict[Protocol, CredentialRow]) -> dict[Protocol, str]:
    """The secrets that are kept already; SSH and OpenVPN have the same."""
    known = {protocol: credentials.secret_of(tx, row) for protocol, row in former.items()}
    for one, other in ((Protocol.SSH, Protocol.OPENVPN), (Protocol.OPENVPN, Protocol.SSH)):
        if other in known:
            known.setdefault(one, known[other])
    return known


def _missing(protocol: Protocol, known: dict[Protocol, str]) -> str | None:
    return None if protocol in known else f"is needed: the account has no {protocol} login yet"
