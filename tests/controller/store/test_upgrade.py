"""A database of the version before, with rows in every table, becomes one of today and loses nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from controller.fleet.tables import AppliedRow, NodeRow
from controller.secretbox import SecretBox
from controller.store.database import Database, open_database
from controller.store.migrate import migrate
from controller.store.upgrade import alembic_config
from shared.resource import Protocol

FIRST = "0001"
ROWS_PER_TABLE = 3


@pytest.fixture
async def first(empty_url: str, secrets: SecretBox) -> AsyncIterator[Database]:
    database = open_database(empty_url, secrets)
    await run(database, lambda connection: command.upgrade(alembic_config(connection), FIRST))
    yield database
    await database.close()


async def run(database: Database, function: Any) -> Any:
    async with database.engine.execution_options(write=True).begin() as connection:
        return await connection.run_sync(function)


def tables(connection: sa.Connection) -> list[sa.Table]:
    """Those that the others point to come first."""
    found = sa.MetaData()
    found.reflect(connection)
    return [table for table in found.sorted_tables if table.name != "alembic_version"]


def value(table: sa.Table, column: sa.Column[Any], number: int) -> object:
    """One of the column's type, which names the row of the same number where it points to another table."""
    if column.foreign_keys:
        (key,) = column.foreign_keys
        return value(key.column.table, key.column, number)
    if column.nullable and number == 2:
        return None
    if isinstance(column.type, sa.LargeBinary):
        return f"{table.name}.{column.name}.{number}".encode()
    if isinstance(column.type, sa.Boolean):
        return bool(number % 2)
    if isinstance(column.type, sa.String | sa.Text):
        name = f"{table.name}.{column.name}"
        return {"nodes.status": "enabled", "nodes.plan": "free", "nodes.country": "DE"}.get(name, f"{name}.{number}")
    return 1_700_000_000_000_000 + number


def fill(connection: sa.Connection) -> None:
    for table in tables(connection):
        for number in range(ROWS_PER_TABLE):
            row = {column.name: value(table, column, number) for column in table.columns}
            connection.execute(table.insert().values(**row))


def content(connection: sa.Connection) -> dict[str, list[dict[str, Any]]]:
    return {
        table.name: [dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()]
        for table in tables(connection)
    }


async def test_every_row_and_every_column_is_still_there(first: Database) -> None:
    await run(first, fill)
    before = await run(first, content)
    assert all(len(rows) == ROWS_PER_TABLE for rows in before.values()) and len(before) > 8
    await migrate(first)
    after = await run(first, content)
    for name, rows in before.items():
        columns = rows[0].keys()
        assert [{column: row[column] for column in columns} for row in after[name]] == rows, name
    assert all(rows == [] for name, rows in after.items() if name not in before)


async def test_foreign_keys_and_indexes_hold_as_before(first: Database) -> None:
    def indexes(connection: sa.Connection) -> set[tuple[str, str | None]]:
        inspector = sa.inspect(connection)
        return {(name, index["name"]) for name in inspector.get_table_names() for index in inspector.get_indexes(name)}

    await run(first, fill)
    before = await run(first, indexes)
    await migrate(first)
    assert before <= await run(first, indexes)
    if first.engine.dialect.name == "postgresql":
        return  # it checks at every write
    broken = await run(first, lambda connection: connection.execute(sa.text("PRAGMA foreign_key_check")).all())
    assert broken == []
    sound = await run(first, lambda connection: connection.execute(sa.text("PRAGMA integrity_check")).scalar_one())
    assert sound == "ok"


async def test_a_node_of_the_version_before_has_wireguard_and_no_complaint(first: Database) -> None:
    await run(first, fill)
    await migrate(first)
    async with first.read() as session:
        nodes = (await session.scalars(sa.select(NodeRow))).all()
        applied = (await session.scalars(sa.select(AppliedRow))).all()
    assert [(node.protocols, node.ssh_host_keys, node.ledger) for node in nodes] == [(Protocol.WIREGUARD, "", "")] * 3
    assert [row.servers for row in applied] == ["{}"] * 3
