"""Brings a database to this version's schema; one that has it is only asked."""

from __future__ import annotations

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

    try:
        async with database.engine.execution_options(write=True).begin() as writer:
            await writer.run_sync(upgrade)
    except DBAPIError as error:
        if getattr(error.orig, "sqlite_errorname", None) == "SQLITE_ERROR":  # the statement's fault
            raise
        raise translate(error, database.engine.url) from error


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(_VERSION.name):
        return None
    return connection.scalar(sa.select(_VERSION.c.version_num))
