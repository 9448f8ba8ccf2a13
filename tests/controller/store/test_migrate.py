from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from controller.secretbox import SecretBox
from controller.store.database import BUSY_TIMEOUT, Database, open_database
from controller.store.migrate import REVISION, migrate
from controller.store.schema import metadata
from controller.store.upgrade import SchemaFromElsewhere, alembic_config


@pytest.fixture
async def empty(empty_url: str, secrets: SecretBox) -> AsyncIterator[Database]:
    database = open_database(empty_url, secrets)
    yield database
    await database.close()


async def run(database: Database, function: Any) -> Any:
    async with database.engine.execution_options(write=True).begin() as connection:
        return await connection.run_sync(function)


def tables(connection: sa.Connection) -> set[str]:
    return set(sa.inspect(connection).get_table_names()) - {"alembic_version"}


async def test_migrations_make_exactly_the_tables_of_the_code(empty: Database) -> None:
    await migrate(empty)

    def differences(connection: sa.Connection) -> list[Any]:
        return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)

    assert await run(empty, differences) == []
    newest = await run(empty, lambda connection: MigrationContext.configure(connection).get_current_revision())
    assert newest == REVISION


async def test_what_is_up_to_date_is_only_read(empty: Database) -> None:
    await migrate(empty)
    async with asyncio.timeout(BUSY_TIMEOUT / 2), empty.transaction() as tx:
        await tx.session.execute(sa.text("DELETE FROM facts"))  # somebody writes
        await migrate(empty)


async def test_migrating_again_changes_nothing_and_keeps_rows(empty: Database) -> None:
    await migrate(empty)
    epoch = await empty.epoch()
    await migrate(empty)
    assert await empty.epoch() == epoch


async def test_the_way_back_leaves_nothing(empty: Database) -> None:
    await migrate(empty)
    await run(empty, lambda connection: command.downgrade(alembic_config(connection), "base"))
    assert await run(empty, tables) == set()
    await migrate(empty)
    assert await run(empty, tables) == set(metadata.tables)


async def test_a_database_of_a_newer_version_is_left_alone(empty: Database) -> None:
    await migrate(empty)
    async with empty.transaction() as tx:
        await tx.session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaFromElsewhere, match="9999"):
        await migrate(empty)


async def test_a_migration_that_fails_leaves_the_old_schema(empty: Database) -> None:
    """The last table is there already, as if half of an earlier attempt had stayed: all or nothing."""
    async with empty.transaction() as tx:
        await tx.session.execute(sa.text("CREATE TABLE applied (stray INTEGER)"))
    with pytest.raises(sa.exc.DBAPIError, match="already exists"):
        await migrate(empty)
    assert await run(empty, tables) == {"applied"}
