"""SQLite files on a disk that takes nothing: full, or read-only."""

from __future__ import annotations

import sqlite3
from pathlib import Path


def open_to_read(path: Path) -> sqlite3.Connection:
    """Open a database for which not even the index of its log can be written; nobody else may have it open."""
    place, log = path.absolute().as_uri(), Path(f"{path}-wal")
    if not log.exists() or not log.stat().st_size:
        return sqlite3.connect(f"{place}?immutable=1", uri=True, check_same_thread=False)
    connection = sqlite3.connect(f"{place}?mode=rw", uri=True, check_same_thread=False)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # the index is in memory then
    return connection
