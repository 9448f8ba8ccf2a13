"""Desired state reaches the node: real database, real sockets, and everything that can get lost."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from controller.channel import connection as connection_module
from controller.channel.pushes import Push, Pushes, encode_snapshot
from controller.channel.session import Wanted
from controller.desired import service as desired
from controller.desired.service import node_scope
from controller.desired.tables import DesiredRow, ScopeRow
from controller.fleet.errors import NothingToConfirm
from controller.fleet.tables import AppliedRow
from controller.secretbox import SecretBox
from controller.store.database import Database, StoreUnavailable, open_database
from controller.store.tables import FactRow
from shared import desired as shared_desired
from shared.desired import Kind, Peer
from shared.keys import encode_key
from shared.protocol import (
    MAX_FRAME_BYTES,
    SNAPSHOT_CHUNK,
    Applied,
    Bye,
    Delta,
    Failure,
    Load,
    Received,
    Refused,
    Report,
    Resource,
    Resync,
    Snapshot,
)
from tests.support.node_port import NEVER, FakeAgent, NodePort, eventually, node_port, until
from tests.support.postgresql import ENGINES


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def peers(count: int, network: int = 1) -> list[Peer]:
    return [
        Peer(public_key=os.urandom(32), allowed_ips=(f"10.{64 + network}.{number // 250}.{number % 250 + 1}/32",))
        for number in range(count)
    ]


async def put(database: Database, scope: str, *resources: Peer) -> int:
    async with database.transaction() as tx:
        return await desired.put(tx, scope, resources)


async def fill(database: Database, scope: str, resources: list[Peer]) -> None:
    """Put many resources beside those that are there, quickly and without telling anybody."""
    async with database.transaction() as tx:
        head = await tx.session.get_one(ScopeRow, scope)
        head.revision += 1
        head.digest = shared_desired.digest_bytes(
            int.from_bytes(head.digest) + sum(resource.digest() for resource in resources)
        )
        rows = [
            {
                "scope": scope,
                "kind": Kind.WIREGUARD_PEER,
                "key": resource.key,
                "revision": head.revision,
                "payload": tx.secrets.seal(
                    shared_desired.encode(resource),
                    table="desired",
                    column="payload",
                    row=f"{scope}/{Kind.WIREGUARD_PEER}/{resource.key}",
                ),
                "deleted": False,
            }
            for resource in resources
        ]
        await tx.session.execute(sa.insert(DesiredRow), rows)


async def converged(database: Database, agent: FakeAgent, scope: str) -> None:
    """Wait until the node has exactly what the database says."""
    async with database.connect() as connection:
        wanted = await desired.state(connection, database.secrets, scope)
    await until(lambda: agent.revisions.get(scope) == wanted.revision and agent.digest(scope) == wanted.digest)
    assert set(agent.resources[scope]) == {(item.kind, item.key) for item in wanted.resources}


async def connected(port: NodePort, name: str = "node-1") -> tuple[FakeAgent, str]:
    agent = await port.enrolled(name)
    await agent.connect()
    scope = node_scope(agent.node_id)
    await until(lambda: agent.revisions.get(scope) == 1)
    return agent, scope


async def no_problem(port: NodePort) -> bool:
    return await port.problem() is None


async def test_a_new_node_gets_its_interface(port: NodePort) -> None:
    agent, scope = await connected(port)
    (interface,) = agent.resources[scope].values()
    assert (interface.key, interface.listen_port) == ("sky0", 51820)  # type: ignore[union-attr]
    assert interface.addresses == ("10.66.0.1/16", "fd66::1/112")  # type: ignore[union-attr]
    await agent.close()


async def test_a_change_arrives_as_a_delta_and_is_waited_for(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    (peer,) = peers(1)
    revision = await put(database, scope, peer)
    assert await port.hub.wait_applied(agent.node_id, scope, revision, 5)
    async with database.transaction() as tx:
        revision = await desired.remove(tx, scope, Kind.WIREGUARD_PEER, [peer.key])
    assert await port.hub.wait_applied(agent.node_id, scope, revision, 5)
    assert await port.hub.wait_applied(agent.node_id, scope, revision, 0)  # also afterwards
    deltas = agent.received(Delta)
    assert [(delta.base, delta.revision) for delta in deltas] == [(1, 2), (2, 3)]
    assert [name.key for name in deltas[1].removals] == [peer.key]
    assert port.value("skynetvpn_push_seconds_count") == 2
    await agent.close()


async def test_a_change_that_its_commit_told_needs_neither_the_writer_nor_the_database(
    port: NodePort, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, scope = await connected(port)

    async def unexpected(_self: object, _wanted: Wanted) -> bool:
        raise AssertionError("the writer was woken")

    monkeypatch.setattr(connection_module.Connection, "_push", unexpected)
    for number in (1, 2, 60):
        revision = await put(database, scope, *peers(number))
        assert await port.hub.wait_applied(agent.node_id, scope, revision, 5)
    await converged(database, agent, scope)
    await agent.close()


async def test_what_is_too_large_to_write_at_once_is_the_writers(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    revisions = [await put(database, scope, *peers(count, number)) for number, count in enumerate((1, 1500, 2))]
    assert await port.hub.wait_applied(agent.node_id, scope, revisions[-1], 30)
    await converged(database, agent, scope)
    bases = [delta.base for delta in agent.received(Delta)]
    assert bases == sorted(bases)
    await agent.close()


@pytest.mark.parametrize(
    ("size", "head"), [(0, "8200"), (125, "827d"), (126, "827e007e"), (256, "827e0100"), (65535, "827effff")]
)
def test_a_message_is_framed_as_a_server_does(size: int, head: str) -> None:
    assert connection_module._message(b"m" * size) == bytes.fromhex(head) + b"m" * size


async def test_waiting_ends_when_the_node_does_not_answer(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    agent.silent = True
    revision = await put(database, scope, *peers(1))
    assert not await port.hub.wait_applied(agent.node_id, scope, revision, 0.1)
    agent.silent = False
    waiting = asyncio.create_task(port.hub.wait_applied(agent.node_id, scope, revision, 20))
    await agent.connect()
    assert await waiting
    await agent.close()


async def test_two_changes_of_one_transaction_are_one_delta(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    first, second = peers(2)
    async with database.transaction() as tx:
        await desired.put(tx, scope, [first])
        await desired.put(tx, scope, [second])
        revision = await desired.remove(tx, scope, Kind.WIREGUARD_PEER, [first.key])
    assert await port.hub.wait_applied(agent.node_id, scope, revision, 5)
    await converged(database, agent, scope)
    assert [(delta.base, delta.revision) for delta in agent.received(Delta)] == [(1, 4)]
    await agent.close()


async def test_what_a_savepoint_undid_is_never_pushed(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    kept, undone = peers(2)
    async with database.transaction() as tx:
        await desired.put(tx, scope, [kept])
        savepoint = await tx.session.begin_nested()
        await desired.put(tx, scope, [undone])
        await savepoint.rollback()
    await converged(database, agent, scope)
    assert [item.key for delta in agent.received(Delta) for item in delta.upserts] == [kept.key]
    await agent.close()


async def test_a_burst_is_coalesced(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    await asyncio.gather(*(put(database, scope, peer) for peer in peers(100)))
    await converged(database, agent, scope)
    assert agent.revisions[scope] == 101
    await agent.close()


async def test_10_000_peers_arrive_in_chunks(database: Database, tmp_path: Path) -> None:
    async with node_port(database, tmp_path / "ca") as port:
        agent = await port.enrolled()
        scope = node_scope(agent.node_id)
        await fill(database, scope, peers(10_000))
        await agent.connect()
        await converged(database, agent, scope)
        parts = agent.received(Snapshot)
        assert [part.part for part in parts] == list(range(6))
        assert [part.last for part in parts] == [False] * 5 + [True]
        assert max(len(part.resources) for part in parts) == SNAPSHOT_CHUNK
        assert len(agent.resources[scope]) == 10_001
        await put(database, scope, *peers(1, network=2))
        await converged(database, agent, scope)
        assert len(agent.received(Snapshot)) == 6  # one change stays one delta
        await agent.close()


async def test_a_returning_node_gets_only_what_it_missed(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    await agent.close()
    await put(database, scope, *peers(3))
    await agent.connect()
    await converged(database, agent, scope)
    assert not agent.received(Snapshot)
    assert [len(delta.upserts) for delta in agent.received(Delta)] == [3]
    await agent.close()


async def test_a_node_that_missed_nothing_gets_no_resources(port: NodePort) -> None:
    agent, _ = await connected(port)
    await agent.connect()
    await until(lambda: agent.received(Delta))
    (delta,) = agent.received(Delta)
    assert (delta.base, delta.revision, delta.upserts, delta.removals) == (1, 1, [], [])
    assert not agent.received(Snapshot)
    await agent.close()


@pytest.mark.parametrize("epoch", ["", "01890a5d-ac96-774b-bcce-b302099a8057"])
async def test_another_epoch_gets_a_snapshot(port: NodePort, database: Database, epoch: str) -> None:
    agent, scope = await connected(port)
    agent.epoch = epoch
    await agent.connect()
    await until(lambda: agent.received(Snapshot))
    await converged(database, agent, scope)
    await agent.close()


async def test_a_revision_ahead_of_ours_gets_a_snapshot_and_is_not_believed(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    agent.revisions[scope] = 57
    await agent.open()
    await agent.send(agent.hello())
    await agent.send(Applied(scope=scope, revision=57, digest=bytes(16)))
    assert not await port.hub.wait_applied(agent.node_id, scope, 2, 0.1)
    await agent.connect()
    await until(lambda: agent.received(Snapshot))
    await converged(database, agent, scope)
    await agent.close()


async def test_an_acknowledgement_of_what_was_never_sent_ends_the_session(port: NodePort) -> None:
    agent, scope = await connected(port)
    await agent.send(Applied(scope=scope, revision=99, digest=bytes(16)))
    await until(lambda: agent.closed)
    assert agent.bye is not None
    assert not await port.hub.wait_applied(agent.node_id, scope, 99, 0)
    await agent.close()


async def test_a_wrong_digest_is_counted_and_healed(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    (stray,) = peers(1, network=9)
    agent._set(scope, (Kind.WIREGUARD_PEER, stray.key), stray)  # somebody changed the host by hand
    await put(database, scope, *peers(1))
    await until(lambda: agent.received(Snapshot)[1:])
    await converged(database, agent, scope)
    assert port.value("skynetvpn_node_drift_total", node="node-1") == 1
    await agent.close()


async def test_a_failed_resource_is_told_in_the_drivers_words(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    failure = Failure("wireguard.peer", "key", "netlink: \x1b[31mno such device\n")
    await agent.send(Applied(scope=scope, revision=1, digest=bytes(16), failures=[failure]))
    await eventually(port.problem)
    assert await port.problem() == "1 not applied; wireguard.peer key: netlink:  [31mno such device "
    await agent.send(Applied(scope=scope, revision=1, digest=agent.digest(scope)))
    await eventually(lambda: no_problem(port))
    await agent.close()


async def test_a_lost_poke_is_made_up_for(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    silent = open_database(str(database.engine.url), database.secrets)  # nobody listens to this one
    await put(silent, scope, *peers(1))
    await converged(database, agent, scope)
    await silent.close()
    await agent.close()


async def test_a_controller_killed_between_commit_and_poke_loses_nothing(
    database: Database, secret_key: bytes, tmp_path: Path
) -> None:
    async with node_port(database, tmp_path / "ca") as port:
        agent, scope = await connected(port)
    await until(lambda: agent.closed)
    (peer,) = peers(1)
    script = f"""
        import asyncio, os, signal
        from controller.desired import service
        from controller.secretbox import SecretBox
        from controller.store.database import open_database
        from shared.desired import Peer
        from shared.keys import decode_key

        async def main():
            secrets = SecretBox({{"k1": bytes.fromhex({secret_key.hex()!r})}}, "k1")
            database = open_database({str(database.engine.url)!r}, secrets)
            database.listen(lambda committed: os.kill(os.getpid(), signal.SIGKILL))
            async with database.transaction() as tx:
                peer = Peer(public_key=decode_key({encode_key(peer.public_key)!r}), allowed_ips=("10.66.0.9/32",))
                await service.put(tx, {scope!r}, [peer])

        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(script), cwd=Path(__file__).parents[3]
    )
    assert await process.wait() == -9
    async with node_port(database, tmp_path / "ca") as port:
        agent.port = port.port
        await agent.connect()
        await converged(database, agent, scope)
        assert (Kind.WIREGUARD_PEER, peer.key) in agent.resources[scope]
        assert not agent.received(Snapshot)
        await agent.close()


async def test_a_stopping_controller_says_goodbye_and_nodes_may_return(database: Database, tmp_path: Path) -> None:
    async with node_port(database, tmp_path / "ca") as port:
        agent, _ = await connected(port)
    await until(lambda: agent.closed)
    assert agent.bye == Bye(reason="the controller is stopping", retry=True)
    await agent.close()


async def test_a_database_error_is_never_an_empty_set(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    await put(database, scope, *peers(5))
    await converged(database, agent, scope)
    await agent.close()
    agent.epoch = "elsewhere"  # so that it needs a snapshot
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE desired RENAME TO hidden"))
    await agent.connect()
    await until(lambda: agent.frames)
    await agent.send(Report(sequence=1, boot_id=agent.boot_id, generation="g"))
    await until(lambda: port.reports)
    assert not agent.received(Snapshot)
    async with database.engine.begin() as connection:
        await connection.execute(sa.text("ALTER TABLE hidden RENAME TO desired"))
    await converged(database, agent, scope)
    await agent.close()


async def test_a_node_is_asked_what_it_has_also_where_the_database_comes_back_later(
    port: NodePort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks nothing, and so no comparison of revisions makes up for the question."""
    agent, _ = await connected(port)
    read, asked, away = Pushes._read, 0, True

    async def unavailable(pushes: Pushes, wanted: Wanted) -> Push:
        nonlocal asked
        asked += 1
        if away:
            raise StoreUnavailable("it is away")
        return await read(pushes, wanted)

    monkeypatch.setattr(Pushes, "_read", unavailable)
    await agent.connect()
    await until(lambda: asked == 2)
    away = False
    await until(lambda: agent.received(Delta))
    await agent.close()


async def test_a_payload_that_does_not_open_is_never_an_empty_set(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    await put(database, scope, *peers(5))
    await converged(database, agent, scope)
    await agent.close()
    agent.epoch = "elsewhere"  # so that it needs a snapshot
    kept, database.secrets = database.secrets, SecretBox({"k1": os.urandom(32)}, "k1")
    with capture_logs() as logs:
        await agent.connect()
        await until(lambda: any(entry["event"] == "channel.desired_unreadable" for entry in logs))
        for number in (1, 2, 3):  # the session goes on, and each wake-up tries again
            port.hub.poke([scope])
            await agent.send(Report(sequence=number, boot_id=agent.boot_id, generation="g"))
            await until(lambda: len(port.reports) == number)  # noqa: B023 - it is awaited here
    assert [entry["log_level"] for entry in logs if entry["event"] == "channel.desired_unreadable"] == ["error"]
    assert not agent.received(Snapshot) and not agent.received(Delta)
    database.secrets = kept
    await converged(database, agent, scope)
    await agent.close()


async def test_a_refused_snapshot_waits_for_the_operator(port: NodePort, database: Database) -> None:
    """The database was restored from an old backup: the epoch differs, and most peers are missing."""
    agent, scope = await connected(port)
    with pytest.raises(NothingToConfirm):
        await port.fleet.confirm_snapshot("node-1")
    await put(database, scope, *peers(30))
    await converged(database, agent, scope)
    agent.epoch, agent.silent = "before the restore", True
    kept = dict(agent.resources[scope])
    async with database.transaction() as tx:
        await desired.remove(tx, scope, Kind.WIREGUARD_PEER, [key for kind, key in kept if kind == Kind.WIREGUARD_PEER])
    await agent.connect()
    await until(lambda: agent.received(Snapshot))
    (offered,) = agent.received(Snapshot)
    assert not offered.confirmed
    refusal = Refused(scope=scope, revision=offered.revision, reason="would remove 30 of 30", removes=30, present=30)
    await agent.send(refusal)
    await until(lambda: port.value("skynetvpn_node_refused_snapshots_total", node="node-1") == 1)
    await put(database, scope, *peers(1))
    await eventually(port.problem)
    assert await port.problem() == "would remove 30 of 30"
    assert agent.resources[scope] == kept
    assert len(agent.received(Snapshot)) == 1  # held, although there was a change
    agent.silent = False
    await port.fleet.confirm_snapshot("node-1")
    await converged(database, agent, scope)
    assert agent.received(Snapshot)[1].confirmed
    await eventually(lambda: no_problem(port))
    with pytest.raises(NothingToConfirm):
        await port.fleet.confirm_snapshot("node-1")
    await agent.close()


async def test_a_node_that_asks_gets_a_snapshot(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    await put(database, scope, *peers(2))
    await converged(database, agent, scope)
    agent.resources.clear()
    await agent.send(Resync(scope=scope, reason="the disk was full"))
    await until(lambda: len(agent.received(Snapshot)) == 2)
    await converged(database, agent, scope)
    await agent.close()


async def test_a_node_that_asks_while_its_change_is_read_gets_a_snapshot_too(
    port: NodePort, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, scope = await connected(port)
    read, reading, go = Pushes._read, asyncio.Event(), asyncio.Event()

    async def slow(pushes: Pushes, wanted: Wanted) -> Push:
        push = await read(pushes, wanted)
        reading.set()
        await go.wait()
        return push

    monkeypatch.setattr(Pushes, "_read", slow)
    await put(database, scope, *peers(SNAPSHOT_CHUNK + 1))  # more than its commit tells
    await reading.wait()
    agent.resources.clear()
    with capture_logs() as logs:
        await agent.send(Resync(scope=scope, reason="the disk was full"))
        await until(lambda: [entry for entry in logs if entry["event"] == "channel.resync"])
    go.set()
    await converged(database, agent, scope)
    assert not agent.received(Delta)
    await agent.close()


async def test_a_refusal_about_a_scope_that_is_not_the_nodes_changes_nothing(
    port: NodePort, database: Database
) -> None:
    agent, scope = await connected(port)
    other = await port.enrolled("node-2")
    await agent.send(Refused(scope=node_scope(other.node_id), revision=1, reason="too much"))
    await until(lambda: port.value("skynetvpn_node_refused_snapshots_total", node="node-1") == 1)
    await put(database, scope, *peers(1))
    await converged(database, agent, scope)
    async with database.read() as session:
        assert await session.get(AppliedRow, (agent.node_id, node_scope(other.node_id))) is None
    for name in ("node-1", "node-2"):
        with pytest.raises(NothingToConfirm):
            await port.fleet.confirm_snapshot(name)
    await agent.close()


async def test_a_confirmation_reaches_a_node_that_was_away(port: NodePort) -> None:
    agent, scope = await connected(port)
    agent.silent = True
    agent.epoch = "other"
    await agent.connect()
    await until(lambda: agent.received(Snapshot))
    await agent.send(Refused(scope=scope, revision=1, reason="too much"))
    await until(lambda: port.value("skynetvpn_node_refused_snapshots_total", node="node-1") == 1)
    await eventually(port.problem)
    await agent.close()
    await until(lambda: agent.node_id not in port.hub.online)
    await port.fleet.confirm_snapshot("node-1")
    await agent.connect()
    await until(lambda: agent.received(Snapshot))
    assert agent.received(Snapshot)[0].confirmed
    await agent.close()


async def test_a_report_is_acknowledged_once_it_is_stored_and_its_load_is_listed(port: NodePort) -> None:
    agent, _ = await connected(port)
    load = Load(total=41.6, cpu=41.6, memory=10, bandwidth=3, peers=1)
    await agent.send(Report(sequence=3, boot_id=agent.boot_id, generation="g", load=load))
    await until(lambda: port.reports)
    assert port.reports[0][0] == agent.node_id
    assert not agent.received(Received)
    port.hub.acknowledge(agent.node_id, 3)
    await until(lambda: agent.received(Received) == [Received(sequence=3)])
    assert port.directory.known(agent.node_id).load == 42
    await agent.close()


async def test_a_slow_node_is_dropped_and_resynchronised(
    port: NodePort, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SEND_DEADLINE", 0.5)
    slow = await port.enrolled("slow")
    quick, scope = await connected(port, "quick")
    slow_scope = node_scope(slow.node_id)
    await fill(database, slow_scope, peers(20_000))  # more than the sockets' buffers hold
    await slow.open()
    await slow.send(slow.hello())  # and nothing is read
    await put(database, scope, *peers(1))
    await converged(database, quick, scope)  # nobody waits for it
    await until(lambda: slow.node_id not in port.hub.online)
    assert port.value("skynetvpn_node_dropped_sessions_total", node="slow") == 1
    monkeypatch.undo()
    await slow.connect()
    await converged(database, slow, slow_scope)
    await slow.close()
    await quick.close()


async def test_nodes_of_a_shared_scope_get_the_same_frames(database: Database, tmp_path: Path) -> None:
    shared = "protocol:ssh"
    async with node_port(database, tmp_path / "ca", intervals=NEVER) as port:
        agents = [await port.enrolled(f"node-{number}") for number in range(5)]
        for agent in agents:
            agent.protocols = ["ssh"]
            await agent.join()
        await until(lambda: all(shared in agent.revisions for agent in agents))
        reads: list[object] = []

        def count(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
            if "LEFT OUTER JOIN desired" in statement:
                reads.append(parameters)

        sa.event.listen(database.engine.sync_engine, "before_cursor_execute", count)
        revision = await put(database, shared, *peers(10))
        for agent in agents:
            assert await port.hub.wait_applied(agent.node_id, shared, revision, 5)
        assert reads == []  # the commit told it
        silent = open_database(str(database.engine.url), database.secrets)
        revision = await put(silent, shared, *peers(10, network=2))
        await silent.close()
        port.hub.poke([shared])
        for agent in agents:
            assert await port.hub.wait_applied(agent.node_id, shared, revision, 5)
        assert len(reads) == 1  # for all five
        for agent in agents:
            await converged(database, agent, shared)
            await agent.close()


async def test_an_answer_that_a_commit_overtook_is_not_kept_for_others(database: Database) -> None:
    scope, pushes = "protocol:wireguard", Pushes(database, await database.epoch())
    await put(database, scope, *peers(1))
    overtaken: list[str] = []

    def overtake(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "LEFT OUTER JOIN desired" in statement and not overtaken:
            overtaken.append(statement)
            pushes.changed(scope)  # a commit was told after this read began

    sa.event.listen(database.engine.sync_engine, "after_cursor_execute", overtake)
    first = await pushes.get(Wanted(scope, 0), shared=True)
    await put(database, scope, *peers(1))
    second = await pushes.get(Wanted(scope, 0), shared=True)
    assert overtaken
    assert (first.revision, second.revision) == (1, 2)
    assert await pushes.get(Wanted(scope, 0), shared=True) is second


async def test_tombstones_go_when_every_node_has_acknowledged(port: NodePort, database: Database) -> None:
    agent, scope = await connected(port)
    (peer,) = peers(1)
    await put(database, scope, peer)
    await agent.close()
    async with database.transaction() as tx:
        revision = await desired.remove(tx, scope, Kind.WIREGUARD_PEER, [peer.key])
    await port.progress.flush()
    await port.progress.purge()
    async with database.read() as session:
        assert await session.scalar(sa.select(sa.func.count()).where(DesiredRow.deleted)) == 1
    await agent.connect()
    await until(lambda: agent.revisions[scope] == revision)

    async def purged() -> bool:
        async with database.read() as session:
            return (await session.get_one(ScopeRow, scope)).floor == revision

    await eventually(purged)  # by the hub's own round
    async with database.read() as session:
        assert await session.scalar(sa.select(sa.func.count()).where(DesiredRow.deleted)) == 0
        assert (await session.get_one(AppliedRow, (agent.node_id, scope))).revision == revision
    agent.revisions[scope] = 1  # a base from before the purge
    await agent.connect()
    await until(lambda: agent.received(Snapshot))
    await converged(database, agent, scope)
    await agent.close()


async def test_a_restored_database_has_another_epoch(database: Database, tmp_path: Path) -> None:
    async with node_port(database, tmp_path / "ca") as port:
        agent, scope = await connected(port)
    async with database.transaction() as tx:
        (await tx.session.get_one(FactRow, "epoch")).value = "after the restore"
    async with node_port(database, tmp_path / "ca") as port:
        agent.port = port.port
        await agent.connect()
        await converged(database, agent, scope)
        assert agent.epoch == "after the restore"
        assert agent.received(Snapshot)
        await agent.close()


def test_frames_stay_small_enough_for_the_other_side() -> None:
    widest = Peer(
        public_key=bytes(range(32)),
        preshared_key=bytes(range(32)),
        keepalive=65535,
        not_after=2**40,
        allowed_ips=tuple(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{n:x}/128" for n in range(0xFF00, 0xFF10)),
    )
    resource = Resource(Kind.WIREGUARD_PEER, widest.key, msgspec.msgpack.encode(widest))
    state = desired.State("node:1", 1, b"", [resource] * (SNAPSHOT_CHUNK + 1))
    frames = encode_snapshot("e" * 36, state, confirmed=True)
    assert len(frames) == 2
    assert max(map(len, frames)) < MAX_FRAME_BYTES
