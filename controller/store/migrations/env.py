"""Alembic's entry: runs on the connection, and in the transaction, that store/upgrade.py hands over."""

from typing import Any, Literal

from alembic import context

from controller.store.schema import metadata
from controller.store.types import Timestamp


def render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """A migration must not change when our code does, so it names only the column types of the engine."""
    return "sa.BigInteger()" if kind == "type" and isinstance(item, Timestamp) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    transactional_ddl=True,
    compare_type=True,
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
