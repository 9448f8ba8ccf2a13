"""Brings a database to this version's schema; one that has it is only asked."""

from __future__ import annotations

from contextlib import AsyncExitStack

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from controller.store.database import Database, translate

REVISION = "0003"  # of the newest migration
_VERSION = sa.table("alembic_version", sa.column("version_num"))


async def migrate(database: Database) -> None:
    """Apply the missing migrations in one transaction; raise SchemaFromElsewhere, or StoreUnavailable where the
    database cannot be had."""
    async with database.connect() as connection:
        if await connection.run_sync(_revision) == REVISION:
            return
    from controller.store.upgrade import upgrade  # Alembic, which every command would import else

    async with AsyncExitStack() as stack:
        try:
            writer = await stack.enter_async_context(database.engine.execution_options(write=True).begin())
        except DBAPIError as error:
            raise translate(error) from error
        await writer.run_sync(upgrade)


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(_VERSION.name):
        return None
    return connection.scalar(sa.select(_VERSION.c.version_num))
