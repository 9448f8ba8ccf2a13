"""Statements for thousands of rows: compiled once per engine, and given tuples that are not converted any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

MICROSECONDS = 1_000_000  # a time in Unix seconds times this is what its column has

Item = TypeVar("Item")


class Bulk:
    """`make` builds the statement, with the engine's own `insert` where it needs one (ON CONFLICT).

    `names` are the parameters in the order of the tuples, which is that of the statement.
    """

    def __init__(self, make: Callable[[Any], Any], names: Sequence[str]) -> None:
        self._make = make
        self._names = list(names)
        self._texts: dict[str, str] = {}

    async def run(self, connection: AsyncConnection, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            text = self._texts.get(connection.dialect.name) or self._compile(connection.dialect)
            await connection.exec_driver_sql(text, rows)

    def _compile(self, dialect: sa.Dialect) -> str:
        insert = postgresql.insert if dialect.name == "postgresql" else sqlite.insert
        compiled = self._make(insert).compile(dialect=dialect)
        if compiled.positiontup != self._names:
            raise ValueError(f"the statement takes {compiled.positiontup}")
        text = self._texts[dialect.name] = str(compiled)
        return text


def batched(items: Sequence[Item], size: int = 500) -> Iterator[Sequence[Item]]:
    """In pieces: engines limit the parameters of a statement."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
