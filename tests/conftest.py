"""What tests share: signals as in a terminal, and a real database file."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller.secretbox import SecretBox
from controller.store.database import Database, open_database
from controller.store.schema import metadata


def pytest_configure() -> None:
    # A shell that starts us in the background has SIGINT ignored, and our children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def secret_key() -> bytes:
    return os.urandom(32)


@pytest.fixture
def secrets(secret_key: bytes) -> SecretBox:
    return SecretBox({"k1": secret_key}, "k1")


@pytest.fixture
async def database(tmp_path: Path, secrets: SecretBox) -> AsyncIterator[Database]:
    opened = open_database(f"sqlite+aiosqlite:///{tmp_path / 'controller.db'}", secrets)
    async with opened.engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    yield opened
    await opened.close()
