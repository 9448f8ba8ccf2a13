"""A new password: hashed first, set inside the transaction, with all that other rooms make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from controller.accounts import rows
from controller.accounts.passwords import Passwords
from controller.accounts.tables import UserRow
from controller.store.database import Transaction

log = structlog.get_logger()


class PasswordFollower(Protocol):
    """Whoever keeps something that is made of an account's password."""

    async def prepare(self, password: str) -> object:
        """The slow part, outside of any transaction; raise InvalidInput where the password is of no use to it."""
        ...

    async def change_password(self, tx: Transaction, user_id: str, prepared: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class NewPassword:
    hashed: str
    prepared: list[object]  # by each follower


class PasswordChanges:
    def __init__(self, passwords: Passwords, followers: Sequence[PasswordFollower] = ()) -> None:
        self._passwords = passwords
        self._followers = followers

    async def prepare(self, password: str) -> NewPassword:
        prepared = [await follower.prepare(password) for follower in self._followers]
        return NewPassword(await self._passwords.hash(password), prepared)

    async def make(self, tx: Transaction, row: UserRow, new: NewPassword, but: str = "") -> None:
        """Set it, and end the account's login sessions `but` this one."""
        row.password_hash = new.hashed
        await rows.end_sessions(tx, row.id, but=but)
        for follower, made in zip(self._followers, new.prepared, strict=True):
            await follower.change_password(tx, row.id, made)
        log.info("accounts.password_changed", user_id=row.id)
