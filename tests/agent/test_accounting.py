"""No byte is lost and none counts twice, whatever falls, restarts, repeats or is killed between two looks."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.allowances import Allowances
from agent.drivers.base import LiveSession
from agent.grants import Grants
from agent.ledger import Ledger
from agent.sessionlog import Entry, SessionLog
from shared.access import Lease, Limits
from shared.protocol import AccountUsage, PeerStats, SessionStats
from shared.resource import Protocol
from tests.agent.fleet import login, peer

ROOT = Path(__file__).parents[2]
METERED = Limits(metered=True, opening=10**12)
PEERS = {
    item.public_key: item for item in (peer(number, account=number % 2 + 1, limits=METERED) for number in range(3))
}
LOGINS = {"user1": login(1), "user2": login(2)}


@dataclass
class World:
    """The truth: what has really passed, and the counters that a host shows of it."""

    moved: dict[int, int] = field(default_factory=dict)
    by_session: dict[str, int] = field(default_factory=dict)
    peers: dict[bytes, int] = field(default_factory=lambda: dict.fromkeys(PEERS, 0))
    generation: int = 1
    live: dict[str, tuple[str, int]] = field(default_factory=dict)  # id -> user name, counter
    told: list[LiveSession] = field(default_factory=list)
    begun: int = 0

    def pass_peer(self, number: int, count: int) -> None:
        key = list(PEERS)[number % len(PEERS)]
        self.peers[key] += count
        account = PEERS[key].account
        self.moved[account] = self.moved.get(account, 0) + count

    def pass_session(self, number: int, count: int) -> None:
        if not self.live:
            self.begin(number)
        session = sorted(self.live)[number % len(self.live)]
        username, there = self.live[session]
        self.live[session] = (username, there + count)
        self.by_session[session] += count
        account = LOGINS[username].account
        self.moved[account] = self.moved.get(account, 0) + count

    def begin(self, number: int) -> None:
        self.begun += 1
        session = f"s{self.begun}"
        self.live[session] = (("user1", "user2")[number % 2], 0)
        self.by_session[session] = 0

    def end(self, number: int) -> None:
        if self.live:
            session = sorted(self.live)[number % len(self.live)]
            self.told.append(self._shown(session, ended=2000))
            del self.live[session]

    def restart_counters(self) -> None:
        """The host's session counters begin anew, as with rules that were loaded again."""
        self.live = {session: (username, 0) for session, (username, _) in self.live.items()}

    def shown(self) -> list[LiveSession]:
        told, self.told = self.told, []
        return [*(self._shown(session) for session in self.live), *told]

    def _shown(self, session: str, ended: int = 0) -> LiveSession:
        username, count = self.live[session]
        return LiveSession(
            id=session, username=username, remote="r:1", address="", since=1000, rx=count, tx=0, ended=ended
        )


class Agent:
    """The books of an agent over their file; `die` without a flush is a kill."""

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger(directory)
        records = self.ledger.open()
        self.fresh = records.fresh
        self.allowances = Allowances(records.ledger, records.used, records.meters, fresh=records.fresh)
        self.log = SessionLog(records.sessions)

    async def look(self, world: World, *, flush: bool = True) -> None:
        taken = self.log.take(Protocol.SSH, world.shown(), LOGINS.get, 3000, old=self.fresh)
        self.fresh = False
        self.ledger.put(used=self.allowances.add(taken.used), sessions=taken.entries)
        stats = [PeerStats(key, count, 0, 1) for key, count in world.peers.items()]
        changed = self.allowances.read(stats, PEERS, str(world.generation))
        self.ledger.put(used=changed.used, meters=changed.meters, gone=changed.gone)
        if flush:
            await self.ledger.flush()

    def die(self) -> None:
        self.ledger._close()


class Controller:
    """Upserts sessions by id and usage by account, as often as they are told."""

    def __init__(self) -> None:
        self.sessions: dict[str, SessionStats] = {}
        self.usage: dict[int, int] = {}

    def hear(self, agent: Agent, *, lose: str, repeat: bool) -> None:
        sessions, usage = agent.log.news(), agent.allowances.news()
        agent.log.sent(sessions)
        agent.allowances.sent(usage)
        if lose != "report":
            for _ in range(2 if repeat else 1):
                self.sessions |= {stats.id: stats for stats in sessions}
                self.usage |= {entry.account: entry.used for entry in usage}
        if lose == "nothing":
            agent.ledger.put(forgotten=agent.log.acknowledged(sessions))
        else:
            agent.log.unsent(sessions)
            agent.allowances.unsent(usage)


TURNS = ["begin", "end", "look", "kill", "stop", "interface", "counters", "readded"]
COUNTS = st.integers(0, 10**6)
STEP = st.one_of(
    st.tuples(st.sampled_from(["peer", "session"]), st.integers(0, 9), COUNTS),
    st.tuples(st.sampled_from(TURNS), st.integers(0, 9), COUNTS),
    st.tuples(st.sampled_from(["report", "answer", "nothing"]), st.integers(0, 1), COUNTS),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_every_byte_counts_once(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_scenario(Path(directory), steps))


async def _scenario(directory: Path, steps: list[tuple[str, int, int]]) -> None:
    world, controller = World(), Controller()
    agent = Agent(directory)
    await agent.look(world)
    for step, number, count in steps:
        match step:
            case "peer":
                world.pass_peer(number, count)
            case "session":
                world.pass_session(number, count)
            case "begin":
                world.begin(number)
            case "end":
                world.end(number)
                await agent.look(world)  # who ends is told once; a kill in between is the next test's
            case "look":
                await agent.look(world)
            case "kill":
                await agent.look(world)
                world.pass_peer(number, count)  # nobody looks, nothing is written
                agent.die()
                agent = Agent(directory)
            case "stop":
                await agent.ledger.close()
                agent = Agent(directory)
            case "interface":
                await agent.look(world)  # the last look before it goes
                world.generation += 1
                world.peers = dict.fromkeys(world.peers, 0)
            case "counters":
                await agent.look(world)
                world.restart_counters()
                await agent.look(world)  # only a look before it has passed where it was can tell
            case "readded":  # a peer goes with a last look at it, and another with the same key comes
                await agent.look(world)
                key = list(PEERS)[number % len(PEERS)]
                agent.ledger.put(gone=agent.allowances.forget([key]))
                world.peers[key] = 0
            case _:
                agent.allowances.judge({1: 10**12, 2: 10**12}, {})
                controller.hear(agent, lose=step, repeat=bool(number))
    await agent.look(world)
    agent.die()
    agent = Agent(directory)
    await agent.look(world)
    assert nonzero(agent.allowances.used) == nonzero(world.moved)
    agent.allowances.judge({1: 10**12, 2: 10**12}, {})
    controller.hear(agent, lose="nothing", repeat=False)
    assert {key: stats.rx + stats.tx for key, stats in controller.sessions.items()} == world.by_session
    assert nonzero(controller.usage) == nonzero(world.moved)
    agent.die()


def nonzero(counts: dict[int, int]) -> dict[int, int]:
    return {account: count for account, count in counts.items() if count}


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.agent.test_accounting import Agent, World

async def main():
    agent, world = Agent(Path(sys.argv[1])), World()
    await agent.look(world)
    while True:
        for number in range(3):
            world.pass_peer(number, 7)
            world.pass_session(number, 5)
        await agent.look(world)
        print(sum(world.moved.values()), flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 40, 160])
def test_sums_and_counters_are_of_one_moment_when_the_agent_is_killed(tmp_path: Path, lines: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        acknowledged = [int(child.stdout.readline()) for _ in range(lines)][-1]
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    records = Agent(tmp_path)
    (used,) = [sum(records.allowances.used.values())]
    meters = sum(count for _, count in records.allowances._meters.values())
    sessions = sum(stats.rx for stats in records.log.live())
    assert used == meters + sessions
    assert used >= acknowledged
    records.die()


# --- records that cannot be used


def test_lost_records_begin_anew_under_another_name_and_count_nothing_old(tmp_path: Path) -> None:
    async def scenario() -> None:
        world, first = World(), Agent(tmp_path)
        await first.look(world)
        world.pass_peer(0, 100)
        world.pass_session(0, 50)
        await first.look(world)
        first.die()
        (tmp_path / "ledger.db").write_bytes(b"\xff" * 8192)
        second = Agent(tmp_path)
        assert second.allowances.ledger != first.allowances.ledger
        await second.look(world)
        assert second.allowances.used == {}
        assert sum(stats.rx for stats in second.log.live()) == 50
        world.pass_peer(0, 9)
        world.pass_session(0, 4)
        await second.look(world)
        assert sum(second.allowances.used.values()) == 13
        second.die()

    asyncio.run(scenario())
    assert (tmp_path / "ledger.db.damaged").exists()


def test_records_that_others_can_read_are_not_trusted(tmp_path: Path) -> None:
    first = Agent(tmp_path)
    first.die()
    (tmp_path / "ledger.db").chmod(0o644)
    second = Agent(tmp_path)
    assert second.allowances.ledger != first.allowances.ledger
    second.die()


async def test_records_that_can_only_be_read_hold_and_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    world, first = World(), Agent(tmp_path)
    await first.look(world)
    world.pass_session(0, 10)
    await first.look(world)
    first.die()
    with monkeypatch.context() as patched:
        patched.setattr("agent.ledger._connect", full)
        agent = Agent(tmp_path)
        assert (agent.allowances.ledger, agent.allowances.used) == (first.allowances.ledger, first.allowances.used)
        world.pass_session(0, 5)
        await agent.look(world)
    world.pass_session(0, 1)
    await agent.look(world)
    agent.die()
    again = Agent(tmp_path)
    assert again.allowances.ledger == first.allowances.ledger
    assert sum(again.allowances.used.values()) == 16
    again.die()


async def test_what_the_disk_did_not_take_is_written_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    world, agent = World(), Agent(tmp_path)
    await agent.look(world)
    with monkeypatch.context() as patched:
        patched.setattr(agent.ledger, "_write", full)
        world.pass_session(0, 10)
        world.pass_peer(0, 1)
        await agent.look(world)
    world.pass_session(0, 5)
    await agent.look(world)
    agent.die()
    again = Agent(tmp_path)
    assert sum(again.allowances.used.values()) == 16
    again.die()


# --- rules of one look


def test_session_keeps_the_account_it_began_with(tmp_path: Path) -> None:
    log = SessionLog()
    shown = LiveSession(id="s", username="u", remote="", address="", since=1, rx=1, tx=0)
    log.take(Protocol.SSH, [shown], lambda _: None, 2)
    assert [stats.account for stats in log.live()] == [0]
    log.take(Protocol.SSH, [shown], {"u": login(7)}.get, 2)
    log.take(Protocol.SSH, [shown], {"u": login(8)}.get, 2)
    assert [stats.account for stats in log.live()] == [7]


def test_session_of_a_protocol_that_is_served_no_more_has_ended() -> None:
    stats = SessionStats("s", "l2tp", 1, "u", "", "", "", 1, 5, 6)
    log = SessionLog([Entry(stats, 5, 6)])
    (ended,) = log.abandon([Protocol.SSH], 9)
    assert (ended.stats.ended, ended.stats.rx, log.live()) == (9, 5, [])


def test_account_that_becomes_metered_begins_with_what_its_peers_had(tmp_path: Path) -> None:
    key, before = next(iter(PEERS.items()))
    allowances = Allowances("l")
    was = PeerStats(key, 1000, 0, 1)
    allowances.read([was], {key: peer(0, account=1)}, "g")
    allowances.read([PeerStats(key, 1400, 0, 1)], {key: before}, "g", earlier={key: was})
    assert allowances.used == {before.account: 400}


def test_judgement_follows_the_lease_of_this_ledger_only() -> None:
    allowances = Allowances("mine", {1: 100})
    assert allowances.judge({1: 100}, {}) == ({1}, set())
    assert allowances.judge({1: 100}, {1: Lease(account=1, allowance=500, ledger="other")}) == (set(), set())
    assert allowances.judge({1: 100}, {1: Lease(account=1, allowance=101, ledger="mine")}) == (set(), {1})
    assert allowances.remaining(1) == 1
    allowances.add({1: 1})
    assert allowances.judge({1: 100}, {1: Lease(account=1, allowance=101, ledger="mine")}, {1}) == ({1}, set())
    assert allowances.judge({}, {}) == (set(), {1})
    assert allowances.remaining(1) is None
    assert allowances.news() == []


def test_looks_come_sooner_the_faster_an_allowance_shrinks() -> None:
    now = 0.0
    allowances = Allowances("l", {1: 0}, clock=lambda: now)
    allowances.judge({1: 1000}, {})
    assert allowances.horizon() is None
    allowances.add({1: 100})
    now = 1.0
    assert allowances.horizon() == 9.0
    allowances.add({1: 899})
    now = 2.0
    assert allowances.horizon() == 0.2
    assert allowances.news() == [AccountUsage(1, 999)]


def test_kernel_begins_anew_with_a_new_allowance_and_for_who_stands_still_with_a_rest() -> None:
    now = 0.0
    allowances = Allowances("l", clock=lambda: now)
    grants = Grants(allowances, clock=lambda: now)
    assert grants.number(1) == 0
    allowances.judge({1: 10**6}, {})
    first = grants.number(1)
    now = 100.0
    assert grants.number(1) == first  # it has used nothing, and all of it remains
    allowances.add({1: 300_000})
    assert grants.number(1) == first
    now = 101.0
    allowances.add({1: 600_000})
    assert grants.number(1) == first  # it moves
    now = 102.0
    assert grants.number(1) == first
    now = 104.0
    second = grants.number(1)
    assert second != first
    now = 300.0
    assert grants.number(1) == second
    allowances.judge({1: 2 * 10**6}, {})
    assert grants.number(1) not in (first, second)
