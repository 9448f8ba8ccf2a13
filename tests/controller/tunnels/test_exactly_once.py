"""Whatever crashes, is repeated or is made anew: the sum in the database is the traffic that really was."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from controller.accounts.tables import UserRow
from controller.fleet.tables import NodeRow
from controller.secretbox import SecretBox
from controller.store.database import Database, open_database
from controller.store.schema import metadata
from controller.tunnels.live import LiveStates
from controller.tunnels.metrics import Metrics
from controller.tunnels.tables import ConnectionRow
from shared.protocol import PeerStats, Report

KEY = b"k" * 32
START = datetime(2026, 1, 1, tzinfo=UTC)

traffic = st.tuples(st.just("traffic"), st.integers(0, 2000))
others = st.tuples(
    st.sampled_from(["report", "repeat", "flush", "crash", "reset", "remake", "reboot"]), st.integers(0, 1000)
)


@dataclass
class Node:
    """An agent as the protocol wants it: it reads counters before it loses them, and repeats what is not stored."""

    live: LiveStates
    boot: int = 0
    generation: int = 0
    sequence: int = 0
    counter: int = 0
    total: int = 0
    unacknowledged: list[Report] = field(default_factory=list)
    acknowledged: list[Report] = field(default_factory=list)

    def attach(self, live: LiveStates) -> None:
        self.live = live
        live.on_stored(self.stored)
        for report in self.unacknowledged:
            live.record("node", report)

    def stored(self, _node_id: str, sequence: int) -> None:
        self.acknowledged += [report for report in self.unacknowledged if report.sequence <= sequence]
        self.unacknowledged = [report for report in self.unacknowledged if report.sequence > sequence]

    def report(self) -> None:
        self.sequence += 1
        stats = PeerStats(KEY, self.counter, 2 * self.counter, 0)
        report = Report(
            sequence=self.sequence, boot_id=f"b{self.boot}", generation=f"g{self.generation}", peers=[stats]
        )
        self.unacknowledged.append(report)
        self.live.record("node", report)

    def repeat(self, number: int) -> None:
        sent = self.acknowledged + self.unacknowledged
        if sent:
            self.live.record("node", sent[number % len(sent)])


def new_live(database: Database) -> LiveStates:
    return LiveStates(database, Metrics(CollectorRegistry()), max_bytes_per_second=1_000_000, clock=lambda: START)


async def prepare(database: Database) -> None:
    async with database.engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    async with database.transaction() as tx:
        tx.session.add_all(
            [
                UserRow(id="user", username="u", username_key="u", email="u", email_key="u", email_verified=True,
                        password_hash="-", role="user", plan="pro", active=True, created_at=START, updated_at=START),
                NodeRow(id="node", name="n", country="DE", city="x", plan="free", status="enabled", created_at=START,
                        wireguard_port=1, former_boot_ids=""),
            ]
        )  # fmt: skip
        await tx.session.flush()
        tx.session.add(
            ConnectionRow(id="c", user_id="user", node_id="node", contract="skynet", protocol="wireguard",
                          created_at=START, public_key=KEY, last_rx=0, last_tx=0, last_handshake=0, rx=0, tx=0)
        )  # fmt: skip


async def scenario(path: Path, steps: list[tuple[str, int]]) -> None:
    secrets = SecretBox({"k1": os.urandom(32)}, "k1")
    database = open_database(f"sqlite+aiosqlite:///{path}", secrets)
    await prepare(database)
    node = Node(new_live(database))
    await node.live.load()
    node.attach(node.live)
    for step, number in [*steps, ("report", 0), ("flush", 0)]:
        match step:
            case "traffic":
                node.counter, node.total = node.counter + number, node.total + number
            case "report":
                node.report()
            case "repeat":
                node.repeat(number)
            case "flush":
                await node.live.flush()
            case "crash":
                live = new_live(database)
                await live.load()
                node.attach(live)
            case "reset":  # the interface is made anew
                node.report()
                node.generation, node.counter = node.generation + 1, 0
            case "remake":  # only the peer is, and it is seen before it has counted more than it had
                node.report()
                node.counter = 0
                node.report()
            case "reboot":
                node.report()
                node.boot, node.generation, node.counter = node.boot + 1, node.generation + 1, 0
    async with database.read() as session:
        row = await session.get(ConnectionRow, "c")
    await database.close()
    assert row is not None
    assert (row.rx, row.tx) == (node.total, 2 * node.total)


@settings(max_examples=60, deadline=None)
@given(st.lists(traffic | others, max_size=30))
@example(
    [
        *[("traffic", 5), ("report", 0), ("flush", 0)],
        *[("traffic", 5), ("report", 0), ("traffic", 5), ("report", 0), ("flush", 0)],
        *[("crash", 0), ("repeat", 1)],
    ]
)
@example(
    [
        *[("traffic", 5), ("report", 0), ("reboot", 0), ("traffic", 3), ("report", 0)],
        ("flush", 0),
        ("crash", 0),
        ("repeat", 0),
    ]
)
def test_the_stored_sum_is_the_true_traffic(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(scenario(Path(directory) / "c.db", steps))
