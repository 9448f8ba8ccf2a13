"""Sessions ended by a process beside the one that counts them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controller.services import stored_sessions
from controller.store.database import Committed, Database, Topic
from controller.usage.errors import SessionNotFound
from shared.access import SessionEnd
from tests.controller.usage.conftest import NODES, connection


async def test_stored_sessions_are_those_that_live_with_their_stored_bytes(world: Any) -> None:
    await world.store(world.stats("s1", rx=10), world.stats("s2", account=2), world.stats("s3", ended=world.seconds))
    world.report(world.stats("s1", rx=15))
    beside = await stored_sessions(world.database)
    assert [(session.id, session.rx) for session in beside.live()] == [("s1", 10), ("s2", 0)]
    assert [session.id for session in beside.live("bob")] == ["s2"]
    assert beside.find("s2").user_id == "bob"
    with pytest.raises(SessionNotFound):
        beside.find("s3")


@pytest.mark.parametrize("noticed", ["before", "after"])
async def test_what_another_process_ends_reaches_its_node_and_is_taken_back_after_the_end(
    world: Any, noticed: str
) -> None:
    await world.store(world.stats("s1"), world.stats("s2", account=2))
    other = Database(world.database.engine, world.database.secrets)  # with nobody of this process listening
    assert await (await stored_sessions(other)).kick(user_id="alice") == 1
    assert await world.wanted() == {"s1": SessionEnd(session="s1")}
    async with asyncio.TaskGroup() as tasks:
        enforcing = tasks.create_task(world.enforcement.run())
        await world.enforcement.enforce()
        if noticed == "before":
            world.database.tell(Committed(frozenset({Topic.EVENTS}), None))
        await world.store(world.stats("s1", ended=world.seconds, reason="kicked"))
        if noticed == "after":
            world.database.tell(Committed(frozenset({Topic.EVENTS}), None))
        async with asyncio.timeout(20):
            while await world.wanted():  # noqa: ASYNC110  # by the task above
                await asyncio.sleep(0.02)
        enforcing.cancel()
    assert world.sessions.live("alice") == []
    assert len(world.sessions.live("bob")) == 1


async def test_a_wireguard_session_takes_its_connection_along(world: Any) -> None:
    async with world.database.transaction() as tx:
        tx.session.add(connection("c1", "alice", b"k" * 32))
    await world.store(world.stats("s1", account=2))
    await world.live.load()
    world.live.book.infer(
        "c1", "alice", NODES[0], rx=1, tx=1, heard=True, handshake=world.seconds, remote="", now=world.seconds
    )
    await world.live.flush()
    assert await (await stored_sessions(world.database)).kick(user_id="alice") == 1
    await world.live.flush()
    assert [session.id for session in world.sessions.live()] == ["s1"]
