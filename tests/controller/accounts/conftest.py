"""Accounts with cheap password hashes on a real database."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from controller.accounts.administration import Administration
from controller.accounts.newpassword import PasswordChanges
from controller.accounts.passwords import Passwords
from controller.accounts.service import Accounts
from controller.config import Passwords as PasswordSettings
from controller.store.database import Database

CHEAP = PasswordSettings(memory_kib=64, time_cost=1, parallelism=1, workers=1, queue=8)


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    made = Passwords(CHEAP)
    yield made
    made.close()


@pytest.fixture
def accounts(database: Database, passwords: Passwords) -> Accounts:
    return Accounts(database, passwords, session_life=timedelta(hours=24))


@pytest.fixture
def administration(database: Database, passwords: Passwords) -> Administration:
    return Administration(database, PasswordChanges(passwords))
