"""The missing migrations, applied in the transaction of the connection; whole or not at all."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from controller.errors import DomainError, ErrorKind

_SCRIPTS = Path(__file__).parent / "migrations"


class SchemaFromElsewhere(DomainError):
    """The database was written by a newer version, or is not ours."""

    kind = ErrorKind.UNAVAILABLE
    code = "schema_unknown"
    message = "the database has schema revision {revision}, which this version does not know; install the newer one"


def alembic_config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    return config


def upgrade(connection: sa.Connection) -> None:
    """Raise SchemaFromElsewhere rather than guess."""
    config = alembic_config(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    for revision in MigrationContext.configure(connection).get_current_heads():
        if revision not in known:
            raise SchemaFromElsewhere(revision=revision)
    command.upgrade(config, "head")
