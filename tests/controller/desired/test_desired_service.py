from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.desired import service as desired_service
from controller.desired.tables import DesiredRow
from controller.secretbox import SecretBox, SecretUnreadable
from controller.store.database import Database
from controller.store.types import new_id
from shared import desired
from shared.desired import EMPTY_DIGEST, Kind, Peer
from tests.support.postgresql import only

SCOPE = "node:1"


def peer(number: int, keepalive: int = 0) -> Peer:
    return Peer(
        public_key=number.to_bytes(32),
        allowed_ips=(f"10.66.{number // 250}.{number % 250 + 1}/32",),
        keepalive=keepalive,
    )


def follow(known: dict[str, bytes], changes: desired_service.Changes) -> dict[str, bytes]:
    """What a node has after it applied the changes."""
    after = {key: payload for key, payload in known.items() if key not in {name.key for name in changes.removals}}
    return after | {resource.key: resource.payload for resource in changes.upserts}


async def test_each_change_is_one_revision_and_no_change_is_none(database: Database) -> None:
    async with database.transaction() as tx:
        assert await desired_service.put(tx, SCOPE, [peer(1), peer(2)]) == 1
        assert await desired_service.put(tx, SCOPE, [peer(1), peer(2)]) == 1
        assert await desired_service.put(tx, SCOPE, [peer(1, keepalive=25)]) == 2
        assert await desired_service.remove(tx, SCOPE, Kind.WIREGUARD_PEER, [peer(2).key]) == 3
        assert await desired_service.remove(tx, SCOPE, Kind.WIREGUARD_PEER, [peer(2).key]) == 3
    assert tx.scopes == {SCOPE}


async def test_a_key_that_comes_back_replaces_its_tombstone(database: Database) -> None:
    async with database.transaction() as tx:
        await desired_service.put(tx, SCOPE, [peer(1)])
        await desired_service.remove(tx, SCOPE, Kind.WIREGUARD_PEER, [peer(1).key])
        await desired_service.put(tx, SCOPE, [peer(1)])
    async with database.connect() as connection:
        changes = await desired_service.changes(connection, database.secrets, SCOPE, 1)
    assert changes is not None
    assert [resource.key for resource in changes.upserts] == [peer(1).key]
    assert changes.removals == []
    assert changes.digest == desired.digest([peer(1)])


async def test_an_unknown_base_needs_a_snapshot(database: Database) -> None:
    async with database.transaction() as tx:
        await desired_service.put(tx, SCOPE, [peer(1), peer(2)])
        await desired_service.remove(tx, SCOPE, Kind.WIREGUARD_PEER, [peer(1).key])
        assert await desired_service.purge(tx, SCOPE, 2) == 1
    async with database.connect() as connection:
        assert await desired_service.changes(connection, database.secrets, SCOPE, 1) is None
        assert await desired_service.changes(connection, database.secrets, SCOPE, 3) is None
        assert await desired_service.changes(connection, database.secrets, "node:unknown", 5) is None
        empty = await desired_service.changes(connection, database.secrets, "node:unknown", 0)
        state = await desired_service.state(connection, database.secrets, SCOPE)
        assert await desired_service.revisions(connection, [SCOPE, "node:unknown"]) == {SCOPE: 2, "node:unknown": 0}
    assert empty is not None
    assert empty.digest == EMPTY_DIGEST
    assert [resource.key for resource in state.resources] == [peer(2).key]


async def test_ten_thousand_peers_in_one_change(database: Database) -> None:
    peers = [peer(number) for number in range(1, 10_001)]
    async with database.transaction() as tx:
        assert await desired_service.put(tx, SCOPE, peers) == 1
    async with database.connect() as connection:
        state = await desired_service.state(connection, database.secrets, SCOPE)
    assert len(state.resources) == 10_000
    assert state.digest == desired.digest(peers)


@only("sqlite")
async def test_a_change_is_looked_up_by_the_whole_key(database: Database) -> None:
    """With a part of it SQLite walks through the whole scope, for every single peer that comes or goes."""
    asked: list[tuple[str, tuple[str, ...]]] = []

    def ask(*call: Any) -> None:
        asked.append((call[2], call[3]))

    sa.event.listen(database.engine.sync_engine, "before_cursor_execute", ask)
    async with database.transaction() as tx:
        await desired_service.put(tx, SCOPE, [peer(1)])
        await desired_service.remove(tx, SCOPE, Kind.WIREGUARD_PEER, [peer(1).key])
    queries = [(text, values) for text, values in asked if "FROM desired" in text]
    assert len(queries) == 2
    async with database.connect() as connection:
        for text, values in queries:
            (step,) = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values)
            assert step.detail.endswith("(scope=? AND kind=? AND key=?)")


steps = st.lists(
    st.tuples(st.sampled_from(["put", "remove", "follow", "purge"]), st.integers(1, 6), st.integers(0, 2)), max_size=25
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
async def test_following_the_deltas_ends_where_the_snapshot_is(
    database: Database, history: list[tuple[str, int, int]]
) -> None:
    scope = desired_service.node_scope(new_id())
    known: dict[str, bytes] = {}
    base = 0
    for action, number, keepalive in history:
        if action == "follow":
            async with database.connect() as connection:
                changes = await desired_service.changes(connection, database.secrets, scope, base)
            assert changes is not None
            known, base = follow(known, changes), changes.revision
            continue
        async with database.transaction() as tx:
            if action == "put":
                await desired_service.put(tx, scope, [peer(number, keepalive)])
            elif action == "remove":
                await desired_service.remove(tx, scope, Kind.WIREGUARD_PEER, [peer(number).key])
            else:
                await desired_service.purge(tx, scope, base)
    async with database.connect() as connection:
        changes = await desired_service.changes(connection, database.secrets, scope, base)
        state = await desired_service.state(connection, database.secrets, scope)
    assert changes is not None
    assert follow(known, changes) == {resource.key: resource.payload for resource in state.resources}
    payloads = [desired.decode(one.kind, one.key, one.payload) for one in state.resources]
    assert state.digest == desired.digest(payloads)


async def stored(database: Database) -> dict[str, DesiredRow]:
    async with database.read() as session:
        return {row.key: row for row in await session.scalars(sa.select(DesiredRow))}


async def test_what_rests_is_sealed_for_its_row(database: Database) -> None:
    known, other = msgspec.structs.replace(peer(1), preshared_key=os.urandom(32)), peer(2)
    async with database.transaction() as tx:
        await desired_service.put(tx, SCOPE, [known, other])
    (told,) = tx.committed().notes
    assert isinstance(told, desired_service.Changes)
    assert [item.payload for item in told.upserts] == [desired.encode(known), desired.encode(other)]
    row = (await stored(database))[known.key]
    assert known.preshared_key is not None
    assert known.preshared_key not in row.payload
    assert known.allowed_ips[0].encode() not in row.payload
    async with database.transaction() as tx:  # one row's payload in another's place
        await tx.session.execute(sa.update(DesiredRow).where(DesiredRow.key == other.key).values(payload=row.payload))
    async with database.connect() as connection:
        with pytest.raises(SecretUnreadable):
            await desired_service.state(connection, database.secrets, SCOPE)


async def test_what_is_unchanged_is_not_written_again_also_after_a_rotation(
    database: Database, secret_key: bytes
) -> None:
    async with database.transaction() as tx:
        await desired_service.put(tx, SCOPE, [peer(1), peer(2)])
    before = await stored(database)
    database.secrets = SecretBox({"k2": os.urandom(32), "k1": secret_key}, "k2")
    async with database.transaction() as tx:
        assert await desired_service.put(tx, SCOPE, [peer(1), peer(2, keepalive=25)]) == 2
    after = await stored(database)
    assert after[peer(1).key].payload == before[peer(1).key].payload
    assert (before[peer(2).key].payload[:3], after[peer(2).key].payload[:3]) == (b"\x02k1", b"\x02k2")
    async with database.connect() as connection:
        state = await desired_service.state(connection, database.secrets, SCOPE)
    assert state.digest == desired.digest([peer(1), peer(2, keepalive=25)])
    assert {item.payload for item in state.resources} == {desired.encode(peer(1)), desired.encode(peer(2, 25))}


async def test_without_the_key_nothing_is_read_changed_or_taken_for_empty(database: Database) -> None:
    async with database.transaction() as tx:
        await desired_service.put(tx, SCOPE, [peer(1)])
    before = (await stored(database))[peer(1).key].payload
    for key_id in ("k1", "k2"):  # another key of the same name, and none of that name
        database.secrets = SecretBox({key_id: os.urandom(32)}, key_id)
        async with database.connect() as connection:
            with pytest.raises(SecretUnreadable, match="'k1'"):
                await desired_service.state(connection, database.secrets, SCOPE)
            with pytest.raises(SecretUnreadable):
                await desired_service.changes(connection, database.secrets, SCOPE, 0)
        with pytest.raises(SecretUnreadable):
            async with database.transaction() as tx:
                await desired_service.put(tx, SCOPE, [peer(1), peer(2)])
        with pytest.raises(SecretUnreadable):
            async with database.transaction() as tx:
                await desired_service.remove(tx, SCOPE, Kind.WIREGUARD_PEER, [peer(1).key])
    rows = await stored(database)
    assert set(rows) == {peer(1).key}
    assert (rows[peer(1).key].payload, rows[peer(1).key].deleted) == (before, False)
