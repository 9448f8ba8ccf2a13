"""Accounts and their logins in a real database, with cheap password hashes of accounts and real ones of crypt(5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from controller.access.service import Access
from controller.access.standing import Standing
from controller.accounts.administration import Administration
from controller.accounts.newpassword import PasswordChanges
from controller.accounts.passwords import Passwords
from controller.accounts.service import Accounts, User
from controller.accounts.tables import UserRow
from controller.config import Passwords as PasswordSettings
from controller.desired import service as desired
from controller.store.database import Database, Transaction
from controller.usage.tables import LimitsRow
from shared import desired as resources
from shared.access import Credential

PASSWORD = "correct horse battery"


@dataclass
class World:
    database: Database
    passwords: Passwords
    told: list[tuple[str, Standing]] = field(default_factory=list)  # what WireGuard peers were brought to

    def __post_init__(self) -> None:
        self.access = Access(self.passwords, self.refresh_peers)
        changes = PasswordChanges(self.passwords, [self.access])
        self.accounts = Accounts(self.database, self.passwords, session_life=timedelta(hours=1), changes=changes)
        self.administration = Administration(self.database, changes, [self.access.end_account])

    async def refresh_peers(self, _tx: Transaction, user_id: str, standing: Standing) -> None:
        self.told.append((user_id, standing))

    async def user(self, name: str = "alice") -> User:
        return await self.accounts.create_user(name, f"{name}@example.com", PASSWORD)

    async def grant(self, user: User, *protocols: str, password: str | None = PASSWORD) -> None:
        secrets = await self.access.prepare(password) if password is not None else None
        async with self.database.transaction() as tx:
            await self.access.grant(tx, user.id, protocols, secrets)

    async def refresh(self, user: User) -> None:
        async with self.database.transaction() as tx:
            await self.access.refresh(tx, user.id)

    async def limit(self, user: User, **columns: Any) -> None:
        """As another room has written it; nobody is told."""
        async with self.database.transaction() as tx:
            row = await tx.session.get(LimitsRow, user.id)
            if row is None:
                row = LimitsRow(user_id=user.id, quota_period="none", used_bytes=0, told="")
                tx.session.add(row)
            for name, value in columns.items():
                setattr(row, name, value)

    async def set_active(self, user: User, active: bool) -> None:
        async with self.database.transaction() as tx:
            await tx.session.execute(sa.update(UserRow).where(UserRow.id == user.id).values(active=active))

    async def wanted(self, *scopes: str) -> dict[str, Credential]:
        """What the nodes have to let in, by key; of all protocols where no scope is named."""
        found: dict[str, Credential] = {}
        async with self.database.connect() as connection:
            for scope in scopes or ("protocol:openvpn", "protocol:ssh", "protocol:l2tp"):
                state = await desired.state(connection, self.database.secrets, scope)
                for item in state.resources:
                    value = resources.decode(item.kind, item.key, item.payload)
                    assert isinstance(value, Credential)
                    assert scope == f"protocol:{value.protocol}"
                    found[value.key] = value
        return found


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    passwords = Passwords(PasswordSettings(memory_kib=64, time_cost=1, parallelism=1, workers=1, queue=8))
    yield World(database, passwords)
    passwords.close()
