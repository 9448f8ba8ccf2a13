"""Reading and changing the rows of accounts, inside somebody's transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controller.accounts import errors, identity
from controller.accounts.principal import Plan, Role
from controller.accounts.tables import LoginSessionRow, UserRow
from controller.errors import InvalidInput
from controller.store.bulk import batched
from controller.store.database import Transaction

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class User:
    id: str
    number: int
    username: str
    email: str
    email_verified: bool
    role: Role
    plan: Plan
    active: bool
    protocols: tuple[str, ...] | None  # that it may use; None = whatever its servers offer
    created_at: datetime
    updated_at: datetime


async def row(session: AsyncSession, user_id: str, *, lock: bool = False) -> UserRow:
    statement = sa.select(UserRow).where(UserRow.id == user_id)
    row = await session.scalar(statement.with_for_update() if lock else statement)
    if row is None:
        raise errors.UserNotFound
    return row


async def numbered(session: AsyncSession, number: int, *, lock: bool = False) -> UserRow:
    statement = sa.select(UserRow).where(UserRow.number == number)
    row = await session.scalar(statement.with_for_update() if lock else statement)
    if row is None:
        raise errors.UserNotFound
    return row


async def keep_an_admin(session: AsyncSession, leaving: UserRow) -> None:
    """Without an administrator nobody could let one in again."""
    if leaving.role != Role.ADMIN:
        return
    others = sa.select(UserRow.id).where(UserRow.role == Role.ADMIN, UserRow.active, UserRow.id != leaving.id)
    if await session.scalar(others.limit(1)) is None:
        raise errors.LastAdmin


def set_email(row: UserRow, email: str | None) -> None:
    if email is not None and email != row.email:
        log.info("accounts.email_changed", user_id=row.id)
        row.email, row.email_key, row.email_verified = email, identity.fold(email), False


async def end_sessions(tx: Transaction, user_id: str, but: str = "") -> None:
    await tx.session.execute(
        sa.delete(LoginSessionRow).where(LoginSessionRow.user_id == user_id, LoginSessionRow.id != but)
    )


async def flush(session: AsyncSession) -> None:
    """Write, and say in the account's words which rule of the table was broken."""
    try:
        await session.flush()
    except IntegrityError as error:
        reason = str(error.orig)
        if "username_key" in reason:
            raise errors.UsernameTaken from error
        if "email_key" in reason:
            raise errors.EmailTaken from error
        raise


def refuse(problems: dict[str, str | None]) -> None:
    found = {field: reason for field, reason in problems.items() if reason is not None}
    if found:
        raise InvalidInput(found)


def user_from_row(row: UserRow) -> User:
    return User(
        row.id,
        row.number,
        row.username,
        row.email,
        row.email_verified,
        Role(row.role),
        Plan(row.plan),
        row.active,
        tuple(row.protocols.split()) if row.protocols is not None else None,
        row.created_at,
        row.updated_at,
    )


async def ids_of(connection: AsyncConnection, numbers: Collection[int]) -> dict[int, str]:
    """The ids of the accounts with these numbers, where there are such."""
    found: dict[int, str] = {}
    for chunk in batched(sorted(numbers)):
        rows = await connection.execute(sa.select(UserRow.number, UserRow.id).where(UserRow.number.in_(chunk)))
        found |= {row.number: row.id for row in rows}
    return found


async def existing(connection: AsyncConnection, user_ids: Collection[str]) -> set[str]:
    """Those of the accounts that were not deleted."""
    found: set[str] = set()
    for chunk in batched(sorted(user_ids)):
        found.update(await connection.scalars(sa.select(UserRow.id).where(UserRow.id.in_(chunk))))
    return found
