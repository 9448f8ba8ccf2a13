"""Tokens of login sessions, and the memory of those that were checked lately."""

from __future__ import annotations

import hashlib
import re
import secrets
import time

import sqlalchemy as sa

from controller.accounts.errors import InvalidToken
from controller.accounts.principal import Plan, Principal, Role
from controller.accounts.tables import LoginSessionRow, UserRow
from controller.store.database import Committed, Database, Topic

_FORM = re.compile(r"sky_[A-Za-z0-9_-]{43}")
_MAX_KNOWN = 100_000


def new_token() -> str:
    """256 random bits; the prefix lets secret scanners find one that leaked."""
    return f"sky_{secrets.token_urlsafe(32)}"


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Sessions:
    """Finds the holder of a token. Any commit to accounts, in whichever process, forgets all that was found before."""

    def __init__(self, database: Database, max_known: int = _MAX_KNOWN) -> None:
        self._database = database
        self._max_known = max_known
        self._known: dict[bytes, tuple[float, Principal]] = {}  # by digest: end in Unix time, holder
        self._changes = 0
        database.listen(self._forget)

    def known(self, token: str) -> Principal | None:
        """The holder, if it needs no database to say so."""
        try:
            ends, principal = self._known[hashlib.sha256(token.encode()).digest()]
        except (KeyError, UnicodeEncodeError):
            return None
        return principal if time.time() < ends else None

    async def find(self, token: str) -> Principal:
        """The holder; raise InvalidToken."""
        if not _FORM.fullmatch(token):
            raise InvalidToken
        principal = self.known(token)
        if principal is not None:
            return principal
        key, changes = digest(token), self._changes
        async with self._database.connect() as connection:
            row = (await connection.execute(_HOLDER, {"token_hash": key})).one_or_none()
        if row is None or row.expires_at.timestamp() <= time.time():
            raise InvalidToken
        principal = Principal(
            row.user_id,
            row.number,
            row.username,
            Role(row.role),
            Plan(row.plan),
            row.session_id,
            row.contract,
            row.created_at,
            key,
            tuple(row.protocols.split()) if row.protocols is not None else None,
        )
        if changes == self._changes:  # else it may already be history
            if len(self._known) >= self._max_known:
                del self._known[next(iter(self._known))]
            self._known[key] = (row.expires_at.timestamp(), principal)
        return principal

    def _forget(self, committed: Committed) -> None:
        if Topic.ACCOUNTS in committed.topics:
            self._changes += 1
            self._known.clear()


_HOLDER = (
    sa.select(
        UserRow.id.label("user_id"),
        UserRow.number,
        UserRow.username,
        UserRow.role,
        UserRow.plan,
        UserRow.protocols,
        LoginSessionRow.id.label("session_id"),
        LoginSessionRow.contract,
        LoginSessionRow.created_at,
        LoginSessionRow.expires_at,
    )
    .join_from(LoginSessionRow, UserRow, LoginSessionRow.user_id == UserRow.id)
    .where(LoginSessionRow.token_hash == sa.bindparam("token_hash"), UserRow.active)
)
