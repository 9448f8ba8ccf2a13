"""Reports become states and sums, at once in memory and soon in the database."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
import structlog

from controller.store.database import StoreUnavailable
from controller.tunnels.connection import Connection
from controller.tunnels.status import Status
from controller.tunnels.tables import ConnectionRow
from shared.keys import decode_key
from shared.protocol import PeerStats, Report

GIGABYTE = 10**9


@pytest.fixture
async def made(world: Any) -> Connection:
    connection: Connection = await world.tunnels().create(
        world.alice, "skynet", world.nodes[0], "wireguard", world.key()
    )
    return connection


async def seen(world: Any, made: Connection) -> Connection:
    connection: Connection = await world.tunnels().get(world.alice, made.id)
    return connection


async def stored(world: Any, made: Connection) -> tuple[int, int]:
    async with world.database.read() as session:
        row = await session.get(ConnectionRow, made.id)
    assert row is not None
    return row.rx, row.tx


async def test_a_report_shows_at_once(world: Any, made: Connection) -> None:
    world.report(made.public_key, 100, 50, 0)
    assert (await seen(world, made)).status is Status.CONNECTING
    world.report(made.public_key, 148, 92, world.ago(1))
    shown = await seen(world, made)
    assert (shown.status, shown.rx, shown.tx) == (Status.CONNECTED, 148, 92)
    assert await stored(world, made) == (0, 0)


async def test_a_silent_connection_is_disconnected_and_comes_back(world: Any, made: Connection) -> None:
    world.report(made.public_key, 1, 1, world.ago(181))
    assert (await seen(world, made)).status is Status.DISCONNECTED
    world.report(made.public_key, 2, 2, world.ago(0))
    assert (await seen(world, made)).status is Status.CONNECTED


async def test_running_writes_what_changed_and_says_what_may_be_acknowledged(world: Any, made: Connection) -> None:
    acknowledged: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
    world.live.on_stored(lambda node_id, sequence: acknowledged.put_nowait((node_id, sequence)))
    task = asyncio.create_task(world.live.run())
    world.report(made.public_key, 10, 20, world.ago())
    world.report(made.public_key, 11, 21, world.ago())
    async with asyncio.timeout(10):
        assert await acknowledged.get() == (world.nodes[0], 2)
    assert await stored(world, made) == (11, 21)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_report_without_peers_and_a_repeated_one_are_acknowledged(world: Any) -> None:
    acknowledged: list[tuple[str, int]] = []
    world.live.on_stored(lambda node_id, sequence: acknowledged.append((node_id, sequence)))
    for _ in range(2):
        world.live.record(world.nodes[0], Report(sequence=7, boot_id="b1", generation="g1"))
        await world.live.flush()
    await world.live.flush()
    assert acknowledged == [(world.nodes[0], 7), (world.nodes[0], 7)]


async def test_the_last_counts_are_written_at_the_end(world: Any, made: Connection) -> None:
    live = world.new_live(interval=3600.0)
    await live.load()
    task = asyncio.create_task(live.run())
    await asyncio.sleep(0)
    world.report(made.public_key, 10, 20, world.ago(), live=live)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert await stored(world, made) == (10, 20)


async def test_a_writer_that_does_not_end_holds_up_no_stop_and_loses_no_count(
    world: Any, made: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.tunnels.live.LAST_FLUSH", 0.05)
    live = world.new_live(interval=3600)
    await live.load()
    stored: list[int] = []
    live.on_stored(lambda _node_id, sequence: stored.append(sequence))
    task = asyncio.create_task(live.run())
    await asyncio.sleep(0)
    world.report(made.public_key, 5, 6, world.ago(), live=live)
    async with world.database.transaction():
        task.cancel()
        await asyncio.wait({task}, timeout=10)
        assert task.done()
        assert stored == []  # so the node tells it again
    await live.flush()
    assert stored == [world.sequence]


async def test_a_new_process_goes_on_where_the_last_one_stopped(world: Any, made: Connection) -> None:
    world.report(made.public_key, 10, 20, world.ago())
    await world.live.flush()
    after = world.new_live()
    await after.load()
    assert after.get(made.id).rx == 10
    world.report(made.public_key, 15, 20, world.ago(), live=after)
    await after.flush()
    assert await stored(world, made) == (15, 20)


async def test_a_repeated_or_late_report_changes_nothing(world: Any, made: Connection) -> None:
    def report(sequence: int, rx: int, boot: str = "b1", generation: str = "g1") -> None:
        peers = [PeerStats(decode_key(made.public_key), rx, 0, 0)]
        frame = Report(sequence=sequence, boot_id=boot, generation=generation, peers=peers)
        world.live.record(world.nodes[0], frame)

    report(1, 100)
    report(2, 200)
    report(1, 100)
    report(2, 200)
    assert world.live.get(made.id).rx == 200
    report(1, 50, "b2", "g2")
    assert world.live.get(made.id).rx == 250
    report(3, 300)  # yesterday's, of the boot before
    report(3, 300, "b1", "g3")
    assert world.live.get(made.id).rx == 250
    await world.live.flush()
    after = world.new_live()
    await after.load()
    for sequence, boot in ((2, "b1"), (1, "b2")):
        peers = [PeerStats(decode_key(made.public_key), 999, 0, 0)]
        after.record(world.nodes[0], Report(sequence=sequence, boot_id=boot, generation="g1", peers=peers))
    assert after.get(made.id).rx == 250


async def test_unknown_peers_and_foreign_nodes_are_ignored(world: Any, made: Connection) -> None:
    world.report(world.key(), 10, 10, world.ago())
    world.report(made.public_key, 10, 10, world.ago(), node=1)
    world.live.record(
        "no-such-node", Report(sequence=1, boot_id="b", generation="g", peers=[PeerStats(b"short", 1, 1, 1)])
    )
    await world.live.flush()
    assert (await seen(world, made)).status is Status.CONNECTING
    assert await stored(world, made) == (0, 0)


async def test_an_ended_connection_is_ignored(world: Any, made: Connection) -> None:
    world.report(made.public_key, 10, 10, world.ago())
    await world.tunnels().terminate(world.alice, made.id)
    await world.live.flush()
    assert await stored(world, made) == (10, 10)
    world.report(made.public_key, 20, 20, world.ago())
    await world.live.flush()
    shown = await seen(world, made)
    assert (shown.rx, shown.tx, shown.status) == (10, 10, Status.DISCONNECTED)
    assert sum(world.live.count_states().values()) == 0


async def test_a_connection_that_another_process_made_is_found(world: Any) -> None:
    elsewhere = world.new_live()
    made = await world.tunnels(elsewhere).create(world.alice, "skynet", world.nodes[0], "wireguard")
    world.report(made.public_key, 10, 10, world.ago())
    await world.live.flush()
    assert await stored(world, made) == (10, 10)
    assert (await seen(world, made)).status is Status.CONNECTED


async def test_a_connection_that_another_process_ended_is_forgotten(world: Any, made: Connection) -> None:
    elsewhere = world.new_live()
    await elsewhere.load()
    await world.tunnels().terminate(world.alice, made.id)
    await elsewhere.flush()
    assert elsewhere.get(made.id) is None


async def test_what_the_peer_of_a_replaced_connection_counted_is_not_counted_again(
    world: Any, made: Connection
) -> None:
    handshake = world.ago(5)
    world.report(made.public_key, 1000, 1000, handshake)
    again = await world.tunnels().create(world.alice, "skynet", world.nodes[0], "wireguard", made.public_key)
    assert (again.status, again.rx) == (Status.CONNECTING, 0)
    world.report(made.public_key, 1010, 1000, handshake)
    shown = await seen(world, again)
    assert (shown.status, shown.rx, shown.tx) == (Status.CONNECTING, 10, 0)
    world.report(made.public_key, 1010, 1000, world.ago())
    assert (await seen(world, again)).status is Status.CONNECTED
    await world.live.flush()
    assert await stored(world, made) == (1000, 1000)
    assert await stored(world, again) == (10, 0)


async def test_a_key_used_again_after_its_end_starts_from_zero(world: Any, made: Connection) -> None:
    handshake = world.ago(5)
    world.report(made.public_key, 1000, 1000, handshake)
    await world.live.flush()
    await world.tunnels().terminate(world.alice, made.id)
    await world.live.flush()
    again = await world.tunnels().create(world.alice, "skynet", world.nodes[0], "wireguard", made.public_key)
    world.report(made.public_key, 1003, 1000, handshake)  # the node was away, and never took the peer off
    shown = await seen(world, again)
    assert (shown.status, shown.rx, shown.tx) == (Status.CONNECTING, 3, 0)
    world.report(made.public_key, 7, 0, world.ago())  # the node made the peer anew
    shown = await seen(world, again)
    assert (shown.status, shown.rx, shown.tx) == (Status.CONNECTED, 10, 0)


async def test_an_impossible_counter_is_quarantined_and_logged_once(world: Any, made: Connection) -> None:
    with structlog.testing.capture_logs() as logs:
        world.report(made.public_key, GIGABYTE, 0, world.ago())
        world.report(made.public_key, 2**63 - 1, 0, 2**63 - 1)
        world.report(made.public_key, 2**63 - 1, 0, world.ago())
        world.report(made.public_key, GIGABYTE + 5, 0, world.ago())
    assert (await seen(world, made)).rx == GIGABYTE + 5
    assert [entry["event"] for entry in logs].count("tunnels.counter_quarantined") == 1
    assert world.registry.get_sample_value("skynetvpn_counter_quarantines_total") == 2
    await world.live.flush()
    assert await stored(world, made) == (GIGABYTE + 5, 0)


async def test_a_handshake_from_the_future_does_not_keep_a_connection_alive_for_ever(
    world: Any, made: Connection
) -> None:
    world.report(made.public_key, 1, 1, 2**62)
    handshake_at = world.live.get(made.id).handshake_at
    assert abs(handshake_at.timestamp() - world.ago()) < 60


async def test_metrics_count_states_and_bytes(world: Any, made: Connection) -> None:
    await world.tunnels().create(world.bob, "skynet", world.nodes[0], "wireguard")
    world.report(made.public_key, 10, 20, world.ago())
    world.report(made.public_key, 15, 20, world.ago())
    sample = world.registry.get_sample_value
    assert sample("skynetvpn_connections", {"state": "connected"}) == 1
    assert sample("skynetvpn_connections", {"state": "connecting"}) == 1
    assert sample("skynetvpn_connections", {"state": "disconnected"}) == 0
    assert (
        sample("skynetvpn_traffic_bytes_total", {"direction": "rx", "node": world.nodes[0], "protocol": "wireguard"})
        == 15
    )
    assert (
        sample("skynetvpn_traffic_bytes_total", {"direction": "tx", "node": world.nodes[0], "protocol": "wireguard"})
        == 20
    )


async def test_counts_survive_a_database_that_is_away_and_are_not_acknowledged_meanwhile(
    world: Any, made: Connection
) -> None:
    acknowledged: list[tuple[str, int]] = []
    world.live.on_stored(lambda node_id, sequence: acknowledged.append((node_id, sequence)))

    def refuse(*_: object) -> None:
        raise StoreUnavailable

    sa.event.listen(world.database.engine.sync_engine, "before_cursor_execute", refuse)
    world.report(made.public_key, 10, 20, world.ago())
    await world.live.flush()
    assert acknowledged == []
    sa.event.remove(world.database.engine.sync_engine, "before_cursor_execute", refuse)
    await world.live.flush()
    assert acknowledged == [(world.nodes[0], 1)]
    assert await stored(world, made) == (10, 20)


async def test_states_are_counted_anew_when_two_seconds_have_passed(
    world: Any, made: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = datetime.now(UTC)
    monkeypatch.setattr(world.live, "_clock", lambda: moment)
    assert world.live.count_states() == {Status.CONNECTING: 1}
    world.report(made.public_key, 10, 20, world.ago())
    assert world.live.count_states() == {Status.CONNECTING: 1}
    moment += timedelta(seconds=2)
    assert world.live.count_states() == {Status.CONNECTED: 1}


async def test_metrics_are_read_by_a_thread_while_connections_come_and_go(
    world: Any, made: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.tunnels.live._COUNT_KEPT", timedelta(0))
    stop, failures, read = threading.Event(), list[Exception](), 0

    def look() -> None:
        nonlocal read
        while not stop.is_set():
            try:
                world.live.count_states()
                world.live.book.counts()
                read += 1
            except Exception as error:
                failures.append(error)
                return

    ledger, entry = world.live._ledger, world.live._ledger.entries[made.id]
    thread = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for number in range(20_000):
            ledger.entries[f"other-{number}"] = entry
            if number % 3 == 0:
                del ledger.entries[f"other-{number}"]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failures
    assert read
