"""SQLite: its engine, and how a transaction begins."""

from __future__ import annotations

import sqlite3
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


def make_engine(url: str, pool_size: int, busy_timeout: float) -> AsyncEngine:
    engine = create_async_engine(url, connect_args={"timeout": busy_timeout}, pool_size=pool_size, max_overflow=0)
    sa.event.listen(engine.sync_engine, "connect", _prepare)
    sa.event.listen(engine.sync_engine, "begin", _begin)
    return engine


def is_damage(error: BaseException | None) -> bool:
    """Whether the file is what is wrong: no database, or a broken one."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says where
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _prepare(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late; _begin sends ours
    cursor = connection.cursor()
    # secure_delete: what was deleted or overwritten is so in the file too, and not only forgotten by its tables.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    # A writer takes its lock at once: upgrading a read lock later fails without waiting when another process wrote.
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
