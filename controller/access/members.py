"""An account with its protocols and limits as one thing: what the panel of an administrator works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controller.access.service import Access
from controller.accounts.administration import Administration
from controller.accounts.principal import Plan, Role
from controller.accounts.service import Accounts, User
from controller.store.database import Database, Transaction
from controller.usage import limits
from controller.usage.limits import AccountLimits, Limits
from shared.resource import Protocol


@dataclass(frozen=True, slots=True)
class Member:
    user: User
    protocols: tuple[str, ...]
    limits: AccountLimits


class Members:
    def __init__(
        self,
        database: Database,
        accounts: Accounts,
        administration: Administration,
        access: Access,
        limits: Limits,
    ) -> None:
        self._database = database
        self._accounts = accounts
        self._administration = administration
        self._access = access
        self._limits = limits

    async def list_users(self) -> list[User]:
        return await self._administration.list_users()

    async def list_members(self) -> list[Member]:
        """All of them, in the order of their numbers."""
        users = await self._administration.list_users()
        async with self._database.read() as session:
            found = await limits.read_all(session)
        return [_member(user, found.get(user.id, limits.NO_LIMITS)) for user in users]

    async def get(self, number: int) -> Member:
        """Raise UserNotFound."""
        return await self._member(await self._administration.user_by_number(number))

    async def create(
        self,
        username: str,
        email: str,
        password: str,
        protocols: Sequence[str] | None,
        *,
        role: Role = Role.USER,
        plan: Plan = Plan.FREE,
    ) -> Member:
        """A new account with a login of each protocol on every node that offers it, all in one transaction.

        Without `protocols` it may use whatever its servers offer, by connections. Raise InvalidInput, UsernameTaken or
        EmailTaken.
        """
        wanted = _in_order(protocols) if protocols is not None else None
        secrets = await self._access.prepare(password, wanted) if wanted is not None else None

        async def grant(tx: Transaction, user: User) -> None:
            if wanted is not None:
                await self._access.grant(tx, user.id, wanted, secrets)

        return await self._member(
            await self._accounts.create_user(username, email, password, role, plan, protocols=wanted, also=grant)
        )

    async def change(
        self,
        number: int,
        *,
        email: str | None = None,
        password: str | None = None,
        role: Role | None = None,
        plan: Plan | None = None,
        active: bool | None = None,
        protocols: Sequence[str] | None = None,
        limits: dict[str, Any] | None = None,
    ) -> Member:
        """Change what is given; of `limits` only what is in it, None taking one away. All of it, or nothing.

        Raise UserNotFound, InvalidInput, EmailTaken, LastAdmin.
        """
        wanted = _in_order(protocols) if protocols is not None else None
        secrets = await self._access.prepare(password, wanted) if password is not None and wanted is not None else None

        async def follow(tx: Transaction, user: User) -> None:
            if wanted is not None:
                await self._access.grant(tx, user.id, wanted, secrets)
            if limits:
                await self._limits.change(tx, user.id, **limits)
            elif active is not None:
                await self._access.refresh(tx, user.id)

        user = await self._administration.update_user(
            number,
            email=email,
            password=password,
            role=role,
            plan=plan,
            active=active,
            protocols=wanted,
            also=follow,
        )
        return await self._member(user)

    async def delete(self, number: int) -> None:
        """Raise UserNotFound, LastAdmin."""
        await self._administration.delete_user(number)

    async def named(self, username: str) -> Member:
        """Raise UserNotFound."""
        return await self._member(await self._administration.user_by_name(username))

    async def _member(self, user: User) -> Member:
        async with self._database.read() as session:
            found = await limits.read(session, user.id)
        return _member(user, found)


def _member(user: User, limits: AccountLimits) -> Member:
    return Member(user, user.protocols if user.protocols is not None else tuple(Protocol), limits)


def _in_order(protocols: Sequence[str]) -> tuple[str, ...]:
    """Each once, in one order."""
    return tuple(protocol for protocol in Protocol if protocol in protocols)
