"""Brings a database to this version's schema, whole or not at all."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError

from controller.errors import DomainError, ErrorKind
from controller.store.database import Database, translate

_SCRIPTS = Path(__file__).parent / "migrations"


class SchemaFromElsewhere(DomainError):
    """The database was written by a newer version, or is not ours."""

    kind = ErrorKind.UNAVAILABLE
    code = "schema_unknown"
    message = "the database has schema revision {revision}, which this version does not know; install the newer one"


async def migrate(database: Database) -> None:
    """Apply the missing migrations in one transaction; raise SchemaFromElsewhere rather than guess, StoreUnavailable
    where the database cannot be had."""
    async with AsyncExitStack() as stack:
        try:
            connection = await stack.enter_async_context(database.engine.execution_options(write=True).begin())
        except DBAPIError as error:
            raise translate(error) from error
        await connection.run_sync(_upgrade)


def alembic_config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: sa.Connection) -> None:
    config = alembic_config(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    for revision in MigrationContext.configure(connection).get_current_heads():
        if revision not in known:
            raise SchemaFromElsewhere(revision=revision)
    command.upgrade(config, "head")
