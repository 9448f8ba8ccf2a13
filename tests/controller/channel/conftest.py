"""A running node port over the test's database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller.store.database import Database
from tests.support.node_port import NodePort, node_port


@pytest.fixture
def engine() -> str:
    """What a session sends is decided in desired and fleet: here test_sync alone runs on both."""
    return "sqlite"


@pytest.fixture
async def port(database: Database, tmp_path: Path) -> AsyncIterator[NodePort]:
    async with node_port(database, tmp_path / "ca") as running:
        yield running
