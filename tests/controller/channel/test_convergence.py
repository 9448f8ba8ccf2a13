"""Whatever is lost, repeated or restarted, the node ends up with exactly what the database says."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.channel.pushes import Push, Pushes
from controller.channel.session import Session, Wanted
from controller.desired import service as desired
from controller.desired.service import Changes, State
from controller.desired.tables import DesiredRow, ScopeRow
from controller.secretbox import SecretBox
from controller.store.database import Committed, open_database
from controller.store.schema import metadata
from shared.desired import Kind, Peer
from shared.protocol import Applied, Frame, Resync, decode_from_controller, encode
from tests.support.node_port import FakeAgent

SCOPE = "node:1"
KEYS = st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)


class ModelAgent(FakeAgent):
    """An agent whose frames wait to be carried, or lost."""

    def __init__(self) -> None:
        super().__init__(0, b"")
        self.outgoing: list[Frame] = []

    async def send(self, frame: Frame) -> None:
        self.outgoing.append(frame)


def peer(number: int, address: int) -> Peer:
    return Peer(public_key=bytes([number + 1]) * 32, allowed_ips=(f"10.66.{address}.{number + 1}/32",))


class Convergence(RuleBasedStateMachine):
    """The session, the pushes and the database are the real ones; only the wire is this machine's."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        secrets = SecretBox({"k1": os.urandom(32)}, "k1")
        self.database = open_database(f"sqlite+aiosqlite:///{Path(self.folder.name) / 'controller.db'}", secrets)
        self.epochs = 1
        self.deliver_pokes = True
        self.clock = 0.0
        self.agent = ModelAgent()
        self.backup: tuple[str, dict[str, int], dict[tuple[str, str], Any], int] = ("", {}, {}, 0)
        self.session: Session | None = None
        self.reading: tuple[Wanted, Push] | None = None
        self.asked = False  # a Resync came in whose snapshot was not sent yet
        self.wire: list[bytes] = []
        self.acknowledged = 0
        self.run(self._create())
        self.rows = self.run(self._dump())
        self.pushes = Pushes(self.database, self.epoch)
        self.database.listen(self._committed)

    @property
    def epoch(self) -> str:
        return f"epoch {self.epochs}"

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    async def _create(self) -> None:
        async with self.database.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)

    def _committed(self, committed: Committed) -> None:
        if self.deliver_pokes and self.session is not None:
            self.pushes.changed(SCOPE, [note for note in committed.notes if isinstance(note, Changes)])
            self.session.poke(SCOPE, self.clock)

    async def _put(self, numbers: list[int], address: int) -> None:
        async with self.database.transaction() as tx:
            await desired.put(tx, SCOPE, [peer(number, address) for number in numbers])

    async def _remove(self, numbers: list[int]) -> None:
        async with self.database.transaction() as tx:
            await desired.remove(tx, SCOPE, Kind.WIREGUARD_PEER, [peer(number, 0).key for number in numbers])

    async def _state(self) -> State:
        async with self.database.connect() as connection:
            return await desired.state(connection, self.database.secrets, SCOPE)

    @rule(numbers=KEYS, address=st.integers(0, 3), poke=st.booleans())
    def put(self, numbers: list[int], address: int, poke: bool) -> None:
        self.deliver_pokes = poke
        self.run(self._put(numbers, address))

    @rule(numbers=KEYS, poke=st.booleans())
    def remove(self, numbers: list[int], poke: bool) -> None:
        self.deliver_pokes = poke
        self.run(self._remove(numbers))

    @rule()
    def connect(self) -> None:
        """Also when connected: what was on the way is lost."""
        self.disconnect()
        self.pushes.forget(SCOPE)
        self.session = Session("1", self.epoch, (SCOPE,))
        hello = self.agent.hello()
        self.session.check(hello)
        self.wire.append(encode(self.session.hello(hello)))

    @precondition(lambda self: self.session is not None)
    @rule()
    def disconnect(self) -> None:
        self.session = self.reading = None
        self.asked = False
        self.wire.clear()
        self.agent.outgoing.clear()

    @precondition(lambda self: self.session is not None)
    @rule()
    def sweep(self) -> None:
        assert self.session is not None
        if self.session.compare(SCOPE, self.run(self._state()).revision, self.clock):
            self.pushes.changed(SCOPE)

    @precondition(lambda self: self.session is not None and self.reading is None)
    @rule(shared=st.booleans())
    def read(self, shared: bool) -> None:
        """What is wanted is read now and sent at some later time."""
        assert self.session is not None
        if (wanted := self.session.wanted()) is not None:
            self.reading = wanted, self.run(self.pushes.get(wanted, shared))

    @precondition(lambda self: self.reading is not None)
    @rule()
    def send(self) -> None:
        assert self.session is not None
        assert self.reading is not None
        (wanted, push), self.reading = self.reading, None
        if self.session.pushing(wanted, push.revision, push.digest):
            self.wire += push.frames
            if wanted.base is None:
                self.asked = False

    def push(self) -> None:
        """Send all that is wanted."""
        assert self.session is not None
        while True:
            if self.reading is not None:
                self.send()
            self.read(shared=False)
            if self.reading is None:
                return

    @precondition(lambda self: self.wire)
    @rule(twice=st.booleans())
    def carry_to_the_node(self, twice: bool) -> None:
        frame = decode_from_controller(self.wire.pop(0))
        assert frame is not None
        for _ in range(2 if twice else 1):
            self.run(self.agent.take(frame))

    @precondition(lambda self: self.agent.outgoing and self.session is not None)
    @rule()
    def carry_to_the_controller(self) -> None:
        assert self.session is not None
        self.clock += 61  # time for the next repair
        match self.agent.outgoing.pop(0):
            case Applied() as applied:
                answer = self.session.applied(applied, self.clock)
                if answer is not None:
                    assert not answer.mismatch
                    self.acknowledged = answer.revision
            case Resync() as resync:
                self.session.resync(resync, self.clock)
                self.asked = True

    @precondition(lambda self: self.session is not None and SCOPE in self.agent.revisions)
    @rule()
    def ask_for_the_whole(self) -> None:
        self.agent.outgoing.append(Resync(scope=SCOPE, reason="the disk was full"))

    @rule()
    def purge(self) -> None:
        async def purge() -> None:
            async with self.database.transaction() as tx:
                await desired.purge(tx, SCOPE, self.acknowledged)

        self.run(purge())

    @rule()
    def back_up_the_node(self) -> None:
        agent = self.agent
        self.backup = (
            agent.epoch,
            dict(agent.revisions),
            dict(agent.resources.get(SCOPE, {})),
            agent._sums.get(SCOPE, 0),
        )

    @rule()
    def restore_the_node(self) -> None:
        self.agent.epoch, self.agent.revisions = self.backup[0], dict(self.backup[1])
        self.agent.resources, self.agent._sums = {SCOPE: dict(self.backup[2])}, {SCOPE: self.backup[3]}
        self.connect()

    @rule()
    def back_up_the_controller(self) -> None:
        self.rows = self.run(self._dump())

    @rule()
    def restore_the_controller(self) -> None:
        self.run(self._load())
        self.acknowledged = 0
        self.epochs += 1
        self.pushes = Pushes(self.database, self.epoch)
        self.connect()

    async def _dump(self) -> list[tuple[Any, list[Any]]]:
        async with self.database.connect() as connection:
            return [
                (table, [dict(row) for row in (await connection.execute(sa.select(table))).mappings()])
                for table in (ScopeRow.__table__, DesiredRow.__table__)
            ]

    async def _load(self) -> None:
        async with self.database.engine.begin() as connection:
            for table, rows in self.rows:
                await connection.execute(sa.delete(table))
                if rows:
                    await connection.execute(sa.insert(table), rows)

    @precondition(lambda self: self.session is not None)
    @rule()
    def settle(self) -> None:
        """Everything that is known of is sent, applied and acknowledged."""
        self.push()
        while self.wire or self.agent.outgoing:
            while self.wire:
                self.carry_to_the_node(twice=False)
            while self.agent.outgoing:
                self.carry_to_the_controller()
            self.push()
        assert not self.asked

    @invariant()
    def the_node_has_what_its_revision_means(self) -> None:
        state = self.run(self._state())
        if self.agent.epoch == self.epoch and self.agent.revisions.get(SCOPE) == state.revision:
            assert self.agent.digest(SCOPE) == state.digest

    def teardown(self) -> None:
        self.connect()
        self.sweep()
        self.settle()
        state = self.run(self._state())
        assert self.agent.revisions[SCOPE] == state.revision
        assert set(self.agent.resources[SCOPE]) == {(item.kind, item.key) for item in state.resources}
        assert self.agent.digest(SCOPE) == state.digest
        self.run(self.database.close())
        self.runner.close()
        self.folder.cleanup()


TestConvergence = Convergence.TestCase
TestConvergence.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
