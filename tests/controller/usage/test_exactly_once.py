"""Whatever is repeated, lost, restarted or made anew: what is billed is what passed, to the byte."""

from __future__ import annotations

import asyncio
import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from controller.secretbox import SecretBox
from controller.store.database import Database, open_database
from controller.store.schema import metadata
from controller.usage.tables import LimitsRow, SessionRow, UsageRow
from shared.protocol import PeerStats, Report, SessionStats
from tests.controller.usage.conftest import NODES, START, World, connection, credential, node, user

KEY = b"k" * 32
_ACCOUNTS = {1: "alice", 2: "bob"}
amounts = st.integers(0, 10_000)


@dataclass
class Host:
    """A node as the protocol wants it: its sessions outlive the agent, unstored ones are told again on a new link."""

    name: str
    boot: int = 0
    generation: int = 0
    sequence: int = 0
    born: int = 0
    sessions: dict[str, SessionStats] = field(default_factory=dict)
    untold: dict[str, int] = field(default_factory=dict)  # session -> sequence of the report that has its news
    pending: list[Report] = field(default_factory=list)
    peer: int = 0  # the WireGuard peer's counter

    def report(self, *, complete: bool) -> Report:
        self.sequence += 1
        told = self.sessions.values() if complete else [self.sessions[name] for name in self.untold]
        report = Report(
            sequence=self.sequence,
            boot_id=f"b{self.boot}",
            generation=f"g{self.generation}",
            sessions=list(told),
            complete=complete,
            peers=[PeerStats(KEY, self.peer, 2 * self.peer, int(START.timestamp()))] if self.name == NODES[0] else [],
        )
        for session in report.sessions:
            self.untold[session.id] = self.sequence
        self.pending.append(report)
        return report

    def stored(self, sequence: int) -> None:
        self.pending = [report for report in self.pending if report.sequence > sequence]
        for name, number in list(self.untold.items()):
            if 0 < number <= sequence:
                del self.untold[name]
                if self.sessions[name].ended:
                    del self.sessions[name]


def open_(path: Path) -> Database:
    return open_database(f"sqlite+aiosqlite:///{path}", SecretBox({"k1": bytes(range(32))}, "k1"))


@functools.cache
def _template() -> Path:
    """Making the tables takes longer than all that a test does with them."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory)
    path = Path(directory) / "c.db"

    async def make() -> None:
        database = open_(path)
        async with database.engine.begin() as opened:
            await opened.run_sync(metadata.create_all)
        async with database.transaction() as tx:
            tx.session.add_all([user(1, "alice"), user(2, "bob"), *(node(name) for name in NODES)])
            await tx.session.flush()
            tx.session.add_all([credential("alice", "ssh"), credential("bob", "ssh"), connection("c1", "alice", KEY)])
        world = World(database)
        for name in _ACCOUNTS.values():
            await world.change(name, quota_bytes=2**60)
        await database.close()

    with asyncio.Runner() as runner:
        runner.run(make())
    return path


class Ledger(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.mkdtemp()
        self.hosts = [Host(name) for name in NODES]
        self.truth: dict[tuple[str, str, str], list[int]] = {}
        self.ever: dict[tuple[str, str], tuple[int, int]] = {}
        self.sent: list[tuple[int, Report]] = []
        _template()
        self.do(self.prepare())

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.do(self.check())
            self.loop.close()
            shutil.rmtree(self.directory)

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    async def prepare(self) -> None:
        path = Path(self.directory) / "c.db"
        shutil.copy(_template(), path)
        self.world = World(open_(path))
        self.follow()
        await self.world.live.load()

    def follow(self) -> None:
        for host in self.hosts:
            self.world.live.on_stored(
                lambda node_id, sequence, host=host: host.stored(sequence) if node_id == host.name else None  # type: ignore[misc]
            )

    def move(self, host: Host, account: int, protocol: str, rx: int, tx: int) -> None:
        total = self.truth.setdefault((host.name, _ACCOUNTS[account], protocol), [0, 0])
        total[0], total[1] = total[0] + rx, total[1] + tx

    @rule(index=st.integers(0, 1), account=st.integers(1, 2), rx=amounts, tx=amounts)
    def session_begins(self, index: int, account: int, rx: int, tx: int) -> None:
        host = self.hosts[index]
        host.born += 1
        session = self.world.stats(f"s{host.born}", account, rx, tx, protocol="ssh")
        self.put(host, session)
        self.move(host, account, "ssh", rx, tx)

    @rule(index=st.integers(0, 1), pick=st.integers(0, 99), rx=amounts, tx=amounts)
    def session_moves(self, index: int, pick: int, rx: int, tx: int) -> None:
        host = self.hosts[index]
        if living := [session for session in host.sessions.values() if not session.ended]:
            session = living[pick % len(living)]
            self.put(host, msgspec.structs.replace(session, rx=session.rx + rx, tx=session.tx + tx))
            self.move(host, session.account, "ssh", rx, tx)

    @rule(index=st.integers(0, 1), pick=st.integers(0, 99))
    def session_ends(self, index: int, pick: int) -> None:
        host = self.hosts[index]
        if living := [session for session in host.sessions.values() if not session.ended]:
            self.put(host, msgspec.structs.replace(living[pick % len(living)], ended=self.world.seconds))

    def put(self, host: Host, session: SessionStats) -> None:
        host.sessions[session.id] = session
        host.untold[session.id] = 0
        self.ever[host.name, session.id] = session.rx, session.tx

    @rule(moved=amounts)
    def wireguard_moves(self, moved: int) -> None:
        self.hosts[0].peer += moved
        self.move(self.hosts[0], 1, "wireguard", moved, 2 * moved)

    @rule()
    def interface_is_made_anew(self) -> None:
        """The agent reads the counters before it takes the interface away."""
        self.send(0, self.hosts[0].report(complete=False))
        self.hosts[0].generation += 1
        self.hosts[0].peer = 0

    @rule(index=st.integers(0, 1))
    def node_reports(self, index: int) -> None:
        self.send(index, self.hosts[index].report(complete=False))

    @rule(index=st.integers(0, 1))
    def link_begins_anew(self, index: int) -> None:
        """What has no answer is told again, and then how things are; acknowledgements on the way are lost."""
        host = self.hosts[index]
        for report in host.pending:
            self.world.live.record(host.name, report)
        host.untold = dict.fromkeys(host.untold, 0)
        self.send(index, host.report(complete=True))

    @rule(index=st.integers(0, 1))
    def node_boots(self, index: int) -> None:
        """Its sessions end with it; the agent had their counters on disk."""
        host = self.hosts[index]
        if index == 0:
            self.send(0, host.report(complete=False))
            host.generation, host.peer = host.generation + 1, 0
        for session in list(host.sessions.values()):
            if not session.ended:
                self.put(host, msgspec.structs.replace(session, ended=self.world.seconds))
        host.boot += 1
        self.link_begins_anew(index)

    @precondition(lambda self: bool(getattr(self, "sent", None)))
    @rule(pick=st.integers(0, 9999))
    def report_is_repeated(self, pick: int) -> None:
        index, report = self.sent[pick % len(self.sent)]
        self.world.live.record(NODES[index], report)

    @rule()
    def controller_stores(self) -> None:
        self.do(self.world.live.flush())

    @rule()
    def controller_dies(self) -> None:
        """All that it had only in memory is gone, and every link with it."""
        self.world.live = self.world.new_live()
        self.do(self.world.live.load())
        self.follow()
        for index in range(len(self.hosts)):
            self.link_begins_anew(index)

    @rule(seconds=st.integers(1, 4000))
    def time_passes(self, seconds: int) -> None:
        self.world.pass_(seconds=seconds)

    def send(self, index: int, report: Report) -> None:
        self.sent.append((index, report))
        self.world.live.record(NODES[index], report)

    async def check(self) -> None:
        for index, host in enumerate(self.hosts):
            self.send(index, host.report(complete=False))
        await self.world.live.flush()
        database = self.world.database
        columns = (UsageRow.node_id, UsageRow.user_id, UsageRow.protocol, UsageRow.rx, UsageRow.tx)
        billed: dict[tuple[str, str, str], list[int]] = {}
        async with database.connect() as opened:
            for *key, rx, tx in await opened.execute(sa.select(*columns)):
                total = billed.setdefault((key[0], key[1], key[2]), [0, 0])
                total[0], total[1] = total[0] + rx, total[1] + tx
            rows = (await opened.execute(sa.select(*SessionRow.__table__.columns))).all()
            used = {row[0]: row[1] for row in await opened.execute(sa.select(LimitsRow.user_id, LimitsRow.used_bytes))}
        await database.close()
        truth = {key: total for key, total in self.truth.items() if any(total)}
        assert billed == truth
        assert {(row.node_id, row.id): (row.rx, row.tx) for row in rows if row.exact} == self.ever
        inferred = [row for row in rows if not row.exact]
        assert sum(row.rx for row in inferred) == truth.get((NODES[0], "alice", "wireguard"), [0, 0])[0]
        for name in _ACCOUNTS.values():
            assert used[name] == sum(sum(total) for key, total in truth.items() if key[1] == name)
        living = {
            (host.name, session.id) for host in self.hosts for session in host.sessions.values() if not session.ended
        }
        assert {(row.node_id, row.id) for row in rows if row.exact and row.ended_at is None} == living


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
