from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.desired import service as desired_service
from controller.store.database import Database
from controller.store.types import new_id
from shared import desired
from shared.desired import EMPTY_DIGEST, Kind, Peer

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
        changes = await desired_service.changes(connection, SCOPE, 1)
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
        assert await desired_service.changes(connection, SCOPE, 1) is None
        assert await desired_service.changes(connection, SCOPE, 3) is None
        assert await desired_service.changes(connection, "node:unknown", 5) is None
        empty = await desired_service.changes(connection, "node:unknown", 0)
        state = await desired_service.state(connection, SCOPE)
        assert await desired_service.revisions(connection, [SCOPE, "node:unknown"]) == {SCOPE: 2, "node:unknown": 0}
    assert empty is not None
    assert empty.digest == EMPTY_DIGEST
    assert [resource.key for resource in state.resources] == [peer(2).key]


async def test_ten_thousand_peers_in_one_change(database: Database) -> None:
    peers = [peer(number) for number in range(1, 10_001)]
    async with database.transaction() as tx:
        assert await desired_service.put(tx, SCOPE, peers) == 1
    async with database.connect() as connection:
        state = await desired_service.state(connection, SCOPE)
    assert len(state.resources) == 10_000
    assert state.digest == desired.digest(peers)


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
                changes = await desired_service.changes(connection, scope, base)
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
        changes = await desired_service.changes(connection, scope, base)
        state = await desired_service.state(connection, scope)
    assert changes is not None
    assert follow(known, changes) == {resource.key: resource.payload for resource in state.resources}
    payloads = [desired.decode(one.kind, one.key, one.payload) for one in state.resources]
    assert state.digest == desired.digest(payloads)
