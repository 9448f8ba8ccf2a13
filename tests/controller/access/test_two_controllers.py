"""Two controllers on one database give logins at the same moment."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa

from controller.access.service import Access
from controller.access.tables import CredentialRow
from controller.accounts.errors import UsernameTaken
from controller.store.database import open_database

PASSWORD = "correct horse battery"


@pytest.fixture
def engine() -> str:
    return "postgresql"


async def test_no_two_logins_share_a_number_and_none_fails(world: Any, database_url: str) -> None:
    users = [await world.user(f"user{number}") for number in range(24)]
    other = open_database(database_url, world.database.secrets)
    access = Access(world.passwords, world.refresh_peers, tunnels=len(users))  # so that they meet at the same numbers
    secrets = await access.prepare(PASSWORD)

    async def grant(number: int) -> None:
        async with (world.database, other)[number % 2].transaction() as tx:
            await access.grant(tx, users[number].id, ["ssh", "openvpn", "l2tp"], secrets)

    await asyncio.gather(*(grant(number) for number in range(len(users))))
    async with other.read() as session:
        numbers = (
            await session.scalars(sa.select(CredentialRow.tunnel).where(CredentialRow.tunnel.is_not(None)))
        ).all()
    assert sorted(numbers) == list(range(1, len(users) + 1))
    assert set(await world.wanted("protocol:ssh")) == {f"ssh/{user.username}" for user in users}
    await other.close()


async def test_of_two_accounts_of_one_name_one_is_told(world: Any, database_url: str) -> None:
    other = open_database(database_url, world.database.secrets)
    beside = type(world)(other, world.passwords)
    made = await asyncio.gather(
        *(
            one.accounts.create_user("alice", f"alice{number}@example.com", PASSWORD)
            for number, one in enumerate((world, beside))
        ),
        return_exceptions=True,
    )
    assert sorted(type(one).__name__ for one in made) == ["User", UsernameTaken.__name__]
    await other.close()
