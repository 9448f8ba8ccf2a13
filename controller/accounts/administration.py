"""What an administrator does with accounts."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
import structlog

from controller.accounts import errors, identity, rows
from controller.accounts.newpassword import PasswordChanges
from controller.accounts.principal import Plan, Role
from controller.accounts.rows import User
from controller.accounts.service import Also, EndService
from controller.accounts.tables import UserRow
from controller.store.database import Database, Topic, Transaction
from controller.store.types import now

log = structlog.get_logger()


class Administration:
    """`end_services` end, in the same transaction, what an account that is deactivated or deleted still uses."""

    def __init__(self, database: Database, changes: PasswordChanges, end_services: Sequence[EndService] = ()) -> None:
        self._database = database
        self._changes = changes
        self._end_services = end_services

    async def list_users(self) -> list[User]:
        """All accounts, in the order of their numbers."""
        async with self._database.read() as session:
            return [
                rows.user_from_row(row) for row in await session.scalars(sa.select(UserRow).order_by(UserRow.number))
            ]

    async def user_by_number(self, number: int) -> User:
        """Raise UserNotFound."""
        async with self._database.read() as session:
            return rows.user_from_row(await rows.numbered(session, number))

    async def user_by_name(self, username: str) -> User:
        """Raise UserNotFound."""
        async with self._database.read() as session:
            row = await session.scalar(sa.select(UserRow).where(UserRow.username_key == identity.fold(username)))
        if row is None:
            raise errors.UserNotFound
        return rows.user_from_row(row)

    async def update_user(
        self,
        number: int,
        *,
        email: str | None = None,
        password: str | None = None,
        role: Role | None = None,
        plan: Plan | None = None,
        active: bool | None = None,
        protocols: Sequence[str] | None = None,
        also: Also | None = None,
    ) -> User:
        """Change an account as an administrator does; None leaves a thing as it is.

        A new password and a deactivation end its login sessions; a deactivation also what it uses. Raise UserNotFound,
        InvalidInput, EmailTaken, LastAdmin.
        """
        before = await self.user_by_number(number)
        problems: dict[str, str | None] = {}
        if password is not None:
            problems["password"] = identity.check_password(password, before.username, before.email)
        if email is not None:
            try:
                email = identity.parse_email(email)
            except ValueError as error:
                problems["email"] = str(error)
        rows.refuse(problems)
        new = await self._changes.prepare(password) if password is not None else None
        async with self._database.transaction() as tx:
            row = await rows.numbered(tx.session, number, lock=True)
            rows.set_email(row, email)
            await _set_standing(tx, row, role, plan)
            if protocols is not None:
                row.protocols = " ".join(protocols)
            if new is not None:
                await self._changes.make(tx, row, new)
            if active is not None and active != row.active:
                await self._set_active(tx, row, active)
            row.updated_at = now()
            await rows.flush(tx.session)
            if also is not None:
                await also(tx, rows.user_from_row(row))
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.updated", user_id=row.id)
        return rows.user_from_row(row)

    async def delete_user(self, number: int) -> None:
        """Delete the account with all that is its own, and end what it uses; raise UserNotFound, LastAdmin."""
        async with self._database.transaction() as tx:
            row = await rows.numbered(tx.session, number, lock=True)
            await rows.keep_an_admin(tx.session, row)
            for end_service in self._end_services:
                await end_service(tx, row.id, "deleted")
            await tx.session.execute(sa.delete(UserRow).where(UserRow.number == number))
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.deleted", user_id=row.id)

    async def _set_active(self, tx: Transaction, row: UserRow, active: bool) -> None:
        if not active:
            await rows.keep_an_admin(tx.session, row)
        row.active = active
        if not active:
            await rows.end_sessions(tx, row.id)
            for end_service in self._end_services:
                await end_service(tx, row.id, "deactivated")
        log.info("accounts.activated" if active else "accounts.deactivated", user_id=row.id)


async def _set_standing(tx: Transaction, row: UserRow, role: Role | None, plan: Plan | None) -> None:
    before = row.role, row.plan
    if role is not None and role is not Role.ADMIN:
        await rows.keep_an_admin(tx.session, row)
    row.role, row.plan = role or row.role, plan or row.plan
    if (row.role, row.plan) != before:
        log.info("accounts.standing_changed", user_id=row.id, role=row.role, plan=row.plan)
