"""What nodes report of sessions: seen at once, stored once, billed once, and ended when they are told to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from controller.accounts.tables import UserRow
from controller.store.database import StoreUnavailable
from controller.tunnels.status import Status, status
from controller.tunnels.tables import ConnectionRow
from controller.usage.book import SILENCE
from shared.access import SessionEnd
from shared.protocol import PeerStats
from tests.controller.usage.conftest import NODES, connection, credential

KEY = b"k" * 32


async def test_a_session_is_listed_with_its_bytes_and_kept_after_its_end(world: Any) -> None:
    await world.store(world.stats("s1", rx=10, tx=20))
    [shown] = world.sessions.live(user_id="alice")
    assert (shown.protocol, shown.node_id, shown.rx, shown.tx, shown.exact) == ("openvpn", NODES[0], 10, 20, True)
    world.report(world.stats("s1", rx=15, tx=20))
    assert world.sessions.live()[0].rx == 15  # before it is stored
    await world.store(world.stats("s1", rx=18, tx=21, ended=world.seconds, reason="client left"))
    assert world.sessions.live() == []
    [past] = await world.sessions.history("alice")
    assert (past.rx, past.tx, past.end_reason, past.ended_at) == (18, 21, "client left", world.now)
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (18, 21)}


async def test_a_session_that_began_and_ended_between_two_reports_counts(world: Any) -> None:
    await world.store(world.stats("s1", rx=7, tx=8, ended=world.seconds))
    row = await world.session("s1")
    assert (row.rx, row.tx, row.ended_at) == (7, 8, world.now)
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (7, 8)}


async def test_hearing_of_an_ended_session_again_counts_only_what_is_new(world: Any) -> None:
    await world.store(world.stats("s1", rx=7, ended=world.seconds))
    for rx in (7, 9, 9):
        await world.store(world.stats("s1", rx=rx, ended=world.seconds))
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (9, 0)}
    assert world.sessions.live() == []


async def test_falling_counters_change_nothing(world: Any) -> None:
    await world.store(world.stats("s1", rx=100, tx=100))
    await world.store(world.stats("s1", rx=40, tx=120))
    await world.store(world.stats("s1", rx=100, tx=120))
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (100, 120)}


@pytest.mark.parametrize("jump", [2**63 - 1, 2**62, 10**14])
@pytest.mark.parametrize("since", [0, None])
async def test_impossible_counters_are_never_billed(world: Any, jump: int, since: int | None) -> None:
    changes = {} if since is None else {"since": world.seconds - 3600}
    await world.change("alice", quota_bytes=10**6)
    await world.store(world.stats("s1", rx=5, **changes))
    await world.store(world.stats("s1", rx=jump, **changes))
    await world.store(world.stats("s2", tx=jump, **changes))
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (5, 0)}
    assert await world.used("alice") == 5
    assert world.registry.get_sample_value("skynetvpn_counter_quarantines_total") == 2


async def test_even_a_session_since_the_beginning_of_time_cannot_have_moved_2_to_the_63(world: Any) -> None:
    await world.store(world.stats("s1", rx=2**63 - 1, since=0))
    assert await world.usage("alice") == {}


@pytest.mark.parametrize(
    "strange",
    [
        {"account": 99},
        {"username": "bob"},  # a login of somebody else
        {"username": "no-such-login"},
        {"protocol": "wireguard"},
        {"protocol": "telnet"},
        {"id": ""},
        {"id": "x" * 65},
        {"id": "a\nb"},
        {"connection": "no-such-connection", "username": "skabc"},
    ],
)
async def test_sessions_that_cannot_be_are_refused_and_counted(world: Any, strange: dict[str, Any]) -> None:
    told = {"rx": 5, **strange}
    await world.store(world.stats(told.pop("id", "s1"), **told), world.stats("good", rx=1))
    assert [session.id for session in world.sessions.live()] == ["good"]
    assert await world.usage("bob") == {}
    assert world.registry.get_sample_value("skynetvpn_sessions_refused_total", {"node": NODES[0]}) == 1


async def test_a_login_of_one_node_is_not_believed_from_another(world: Any) -> None:
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.text("DELETE FROM credentials WHERE user_id = 'alice'"))
        tx.session.add(credential("alice", "openvpn", NODES[0]))
    await world.store(world.stats("s1", rx=5), node=1)
    assert world.sessions.live() == []
    await world.store(world.stats("s1", rx=5), node=0)
    assert len(world.sessions.live()) == 1


async def test_the_last_words_of_a_connection_that_has_no_login_any_more_count(world: Any) -> None:
    async with world.database.transaction() as tx:
        row = connection("c1", "alice", KEY, "openvpn")
        row.ended_at = world.now
        tx.session.add(row)
    await world.store(world.stats("s1", rx=5, username="gone", connection="c1", ended=world.seconds))
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (5, 0)}


async def test_a_complete_report_ends_every_other_session_of_the_node(world: Any) -> None:
    await world.store(world.stats("s1"), world.stats("s2", rx=1), world.stats("s3"))
    await world.store(world.stats("s1"), node=1)
    await world.store(world.stats("s2", rx=4), world.stats("s4", rx=2), complete=True)
    assert {(session.node_id, session.id) for session in world.sessions.live()} == {
        (NODES[0], "s2"),
        (NODES[0], "s4"),
        (NODES[1], "s1"),
    }
    assert (await world.session("s1")).end_reason == "lost"
    assert (await world.session("s1", node=1)).ended_at is None
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (6, 0)}


async def test_an_empty_complete_report_ends_all(world: Any) -> None:
    await world.store(world.stats("s1"))
    await world.store(complete=True)
    assert world.sessions.live() == []


async def test_a_session_that_was_given_up_too_early_comes_back(world: Any) -> None:
    await world.store(world.stats("s1", rx=3))
    await world.store(complete=True)
    await world.store(world.stats("s1", rx=5))
    assert [session.rx for session in world.sessions.live()] == [5]
    assert (await world.session("s1")).ended_at is None
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (5, 0)}


async def test_the_next_process_goes_on_where_the_last_one_stopped(world: Any) -> None:
    await world.store(world.stats("s1", rx=10))
    world.report(world.stats("s1", rx=15))  # lost with the process
    after = world.new_live()
    await after.load()
    world.report(world.stats("s1", rx=20), live=after)
    await after.flush()
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (20, 0)}


async def test_what_another_controller_counted_meanwhile_is_not_counted_again(world: Any) -> None:
    other = world.new_live()
    await world.store(world.stats("s1", rx=10))
    world.report(world.stats("s1", rx=30), complete=True, live=other)
    await other.flush()
    world.report(world.stats("s1", rx=35), complete=True)
    world.report(world.stats("s1", rx=40))
    await world.live.flush()
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (40, 0)}


async def test_a_deleted_account_stops_nobody_elses_counting(world: Any) -> None:
    await world.store(world.stats("s1", rx=1), world.stats("s2", account=2, rx=1))
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.delete(UserRow).where(UserRow.id == "alice"))
    await world.store(world.stats("s1", rx=9), world.stats("s2", account=2, rx=9))
    assert await world.usage("bob") == {(NODES[0], "openvpn"): (9, 0)}
    assert [session.id for session in world.sessions.live()] == ["s2"]
    assert world.acknowledged[-1] == (NODES[0], world.sequence)


async def test_what_a_deleted_account_had_of_its_quota_is_nobodys(world: Any) -> None:
    for account in ("alice", "bob"):
        await world.change(account, quota_bytes=10**9)
    await world.store(world.stats("s1", rx=5), world.stats("s2", account=2, rx=5), used={1: 5, 2: 5})
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.delete(UserRow).where(UserRow.id == "alice"))
    await world.store(world.stats("s2", account=2, rx=9), used={1: 7, 2: 9})
    assert await world.used("bob") == 9
    assert world.acknowledged[-1] == (NODES[0], world.sequence)


async def test_nothing_is_acknowledged_or_lost_while_the_database_is_away(world: Any) -> None:
    await world.store(world.stats("s1", rx=1))
    acknowledged = list(world.acknowledged)

    def broken(*_: object) -> None:
        raise StoreUnavailable

    sa.event.listen(world.database.engine.sync_engine, "begin", broken)
    world.report(world.stats("s1", rx=5))
    await world.live.flush()
    world.report(world.stats("s1", rx=6, ended=world.seconds))
    await world.live.flush()
    assert world.acknowledged == acknowledged
    sa.event.remove(world.database.engine.sync_engine, "begin", broken)
    await world.live.flush()
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (6, 0)}
    assert (await world.session("s1")).ended_at is not None


async def test_what_ended_before_it_was_stored_is_known_when_the_next_link_begins(world: Any) -> None:
    faults = [StoreUnavailable()]

    def broken(*_: object) -> None:
        if faults:
            raise faults.pop()

    await world.store(world.stats("s1", rx=1))
    world.report(world.stats("s1", rx=5, ended=world.seconds, reason="client left"))
    world.report(world.stats("s2", rx=7))
    sa.event.listen(world.database.engine.sync_engine, "commit", broken)
    await world.live.flush()
    assert faults == []
    world.report(world.stats("s2", rx=9, ended=world.seconds))
    world.report(world.stats("s2", rx=9, ended=world.seconds), complete=True)
    await world.live.flush()
    assert world.sessions.live() == []
    first, second = await world.session("s1"), await world.session("s2")
    assert (first.rx, first.end_reason, second.rx, second.ended_at) == (5, "client left", 9, world.now)
    assert await world.usage("alice") == {(NODES[0], "openvpn"): (14, 0)}


async def test_usage_is_by_the_hour(world: Any) -> None:
    await world.store(world.stats("s1", rx=5))
    world.pass_(hours=1)
    await world.store(world.stats("s1", rx=9))
    await world.store(world.stats("s1", rx=10))
    hours = await world.sessions.usage("alice", world.now - timedelta(days=1), world.now + timedelta(days=1))
    assert [(hour.hour.hour, hour.rx) for hour in hours] == [(12, 5), (13, 5)]


async def test_users_are_counted_once_per_protocol(world: Any) -> None:
    ssh = {"protocol": "ssh"}
    await world.store(world.stats("a"), world.stats("b"), world.stats("c", **ssh), world.stats("d", account=2, **ssh))
    assert world.sessions.users_by_protocol() == {"openvpn": 1, "ssh": 2}
    assert world.sessions.users_by_protocol(NODES[1]) == {}
    gauge = {"node": NODES[0], "protocol": "ssh"}
    assert world.registry.get_sample_value("skynetvpn_sessions", gauge) == 2


async def test_a_kick_tells_the_nodes_until_the_session_has_ended(world: Any) -> None:
    await world.store(world.stats("s1"), world.stats("s2", protocol="ssh"), world.stats("s3", account=2))
    await world.store(world.stats("s4"), node=1)
    assert await world.sessions.kick(user_id="alice") == 3
    assert await world.wanted(0) == {"s1": SessionEnd(session="s1"), "s2": SessionEnd(session="s2")}
    assert await world.wanted(1) == {"s4": SessionEnd(session="s4")}
    await world.store(world.stats("s1", ended=world.seconds, reason="kicked"))
    await world.enforcement.enforce()
    assert set(await world.wanted(0)) == {"s2"}
    assert ("session.kicked", "alice") in await world.told()


async def test_one_session_is_kicked_and_an_unknown_one_is_no_error(world: Any) -> None:
    await world.store(world.stats("s1"), world.stats("s2"))
    first = world.sessions.live()[0]
    assert await world.sessions.kick(session=first) == 1
    assert set(await world.wanted()) == {first.id}
    assert await world.sessions.kick(user_id="nobody") == 0


async def test_kicks_are_tidied_up_by_the_next_process(world: Any) -> None:
    await world.store(world.stats("s1"))
    await world.sessions.kick(user_id="alice")
    world.report(world.stats("s1", ended=world.seconds))
    await world.live.flush()
    await world.sessions.load()
    await world.sessions.tidy()
    assert await world.wanted() == {}


async def test_wireguard_sessions_are_inferred(world: Any) -> None:
    async with world.database.transaction() as tx:
        tx.session.add(connection("c1", "alice", KEY))
    await world.live.load()

    def peer(rx: int, tx: int, ago: int) -> PeerStats:
        return PeerStats(KEY, rx, tx, world.seconds - ago, "198.51.100.7:5555")

    await world.store(peers=[PeerStats(KEY, 148, 0, 0)])
    assert world.sessions.live() == []
    await world.store(peers=[peer(300, 92, 1)])
    [session] = world.sessions.live()
    assert (session.exact, session.remote, session.protocol) == (False, "198.51.100.7:5555", "wireguard")
    assert (session.rx, session.tx) == (152, 92)
    world.pass_(seconds=100)
    await world.store(peers=[peer(1300, 92, 101)])  # traffic without a handshake is a sign of life too
    world.pass_(seconds=SILENCE - 1)
    await world.live.flush()
    assert len(world.sessions.live()) == 1
    world.pass_(seconds=1)
    await world.live.flush()
    assert world.sessions.live() == []
    [past] = await world.sessions.history("alice")
    assert (past.rx, past.end_reason, past.ended_at) == (1152, "silent", world.now - timedelta(seconds=SILENCE))
    assert await world.usage("alice") == {(NODES[0], "wireguard"): (1300, 92)}
    await world.store(peers=[peer(1500, 200, 0)])
    assert [session.rx for session in world.sessions.live()] == [200]


async def test_a_kick_ends_the_connection_of_an_inferred_session(world: Any) -> None:
    async with world.database.transaction() as tx:
        tx.session.add(connection("c1", "alice", KEY))
    await world.live.load()
    await world.store(peers=[PeerStats(KEY, 300, 92, world.seconds)])
    assert await world.sessions.kick(user_id="alice") == 1
    await world.live.flush()
    assert world.sessions.live() == []
    async with world.database.read() as session:
        row = await session.get(ConnectionRow, "c1")
    assert row.end_reason == "kicked"
    await world.live.flush()
    assert [past.end_reason for past in await world.sessions.history("alice")] == ["kicked"]


async def test_a_connection_of_another_protocol_lives_by_its_sessions(world: Any) -> None:
    async with world.database.transaction() as tx:
        tx.session.add(connection("c1", "alice", KEY, "openvpn"))
    await world.live.load()

    def state() -> Status:
        known = world.live.get("c1")
        return status(None, known.handshake_at, world.now, known.live)

    assert state() is Status.CONNECTING
    await world.store(world.stats("s1", rx=3, tx=4, connection="c1"))
    assert state() is Status.CONNECTED
    await world.store(world.stats("s1", rx=5, tx=4, connection="c1", ended=world.seconds))
    assert state() is Status.DISCONNECTED
    await world.store(world.stats("s2", rx=1, connection="c1"))
    assert state() is Status.CONNECTED
    assert world.live.get("c1")[:2] == (6, 4)
    async with world.database.read() as session:
        row = await session.get(ConnectionRow, "c1")
    assert (row.rx, row.tx, row.handshake_at) == (6, 4, world.now)
