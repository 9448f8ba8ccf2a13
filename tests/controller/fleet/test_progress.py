"""How far nodes have come, as it is written down."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controller.fleet.nodes import NodeSpec
from controller.fleet.progress import Progress, Standing
from controller.fleet.service import Fleet
from controller.store.database import Database, StoreUnavailable
from tests.controller.fleet.test_protocols import SETTINGS


async def test_an_acknowledgement_from_before_is_not_written_over_a_refusal(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(database, bytes(32), SETTINGS)
    await fleet.issue_join_token(NodeSpec(name="node-1", country="DE", city="Berlin"))
    (node,) = await fleet.nodes()
    progress, under_way, go = Progress(database), asyncio.Event(), asyncio.Event()
    write = progress._upsert

    async def fail(_rows: list[dict[str, Any]], _columns: list[str]) -> None:
        monkeypatch.setattr(progress, "_upsert", write)
        under_way.set()
        await go.wait()
        raise StoreUnavailable("it is locked")

    monkeypatch.setattr(progress, "_upsert", fail)
    progress.applied(node.id, "scope", 5, b"", None)
    flush = asyncio.create_task(progress.flush())
    await under_way.wait()
    refusal = asyncio.create_task(progress.refused(node.id, "scope", 6, "too much"))
    await asyncio.wait([refusal], timeout=0.1)  # without its turn it would be through by now
    go.set()
    with pytest.raises(StoreUnavailable):
        await flush
    await refusal
    await progress.flush()
    assert await progress.standing(node.id) == {"scope": Standing(6, confirmed=False)}
