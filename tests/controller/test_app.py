"""What the running controller does beside its rooms."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from controller import app
from controller.accounts.service import Accounts
from controller.store.database import StoreUnavailable


async def test_a_database_that_is_away_at_the_purge_of_logins_does_not_end_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "_PURGE_INTERVAL", 0)
    back = asyncio.Event()

    class AwayAtFirst:
        tries = 0

        async def purge_sessions(self) -> int:
            self.tries += 1
            if self.tries == 1:
                raise StoreUnavailable
            back.set()
            return 0

    purging = asyncio.create_task(app._purge_sessions(cast(Accounts, AwayAtFirst())))
    await asyncio.wait((purging, asyncio.create_task(back.wait())), return_when=asyncio.FIRST_COMPLETED)
    assert not purging.done()
    purging.cancel()
