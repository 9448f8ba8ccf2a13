"""The stored state: threat 7 (a damaged file is never "no peers") and threat 28 (a full disk)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.state import State, StateError
from shared.desired import digest
from shared.protocol import Applied, Resync
from tests.agent.fleet import INTERFACE, SCOPE, Node, delta, name, peer, resource, snapshot, until, welcome

PEERS = [peer(number) for number in range(20)]
RESOURCES = [resource(item) for item in (INTERFACE, *PEERS)]


async def filled(directory: Path) -> None:
    state = State(directory)
    await state.open()
    await state.replace(SCOPE, "e1", 7, RESOURCES)
    await state.close()


async def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    await filled(tmp_path)
    state = State(tmp_path)
    await state.open()
    await state.change(SCOPE, 8, [resource(peer(99))], [name(PEERS[0])])
    await state.close()
    stored = await (again := State(tmp_path)).open()
    await again.close()
    assert stored.trusted
    assert (stored.epoch, stored.scopes[SCOPE].revision) == ("e1", 8)
    wanted = [*RESOURCES[:1], *RESOURCES[2:], resource(peer(99))]
    assert stored.scopes[SCOPE].resources == wanted
    assert stat.S_IMODE((tmp_path / "state.db").stat().st_mode) == 0o600


async def test_small_change_waits_for_another_process_without_holding_up_the_agent(tmp_path: Path) -> None:
    await filled(tmp_path)
    state = State(tmp_path)
    await state.open()
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        change = asyncio.create_task(state.change(SCOPE, 8, [resource(peer(99))], []))
        done, _ = await asyncio.wait([change], timeout=0.2)
        assert not done
        other.execute("COMMIT")
    await change
    await state.close()
    stored = await (again := State(tmp_path)).open()
    await again.close()
    assert stored.scopes[SCOPE].revision == 8


async def test_log_of_small_changes_does_not_grow_for_ever(tmp_path: Path) -> None:
    await filled(tmp_path)
    state = State(tmp_path)
    await state.open()
    sizes = []
    for revision in range(8, 2008):
        await state.change(SCOPE, revision, [resource(peer(99))], [])
        sizes.append((tmp_path / "state.db-wal").stat().st_size)
    await state.close()
    assert max(sizes[1000:]) <= max(sizes[:1000])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def scribbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:12288] = os.urandom(8192)
    path.write_bytes(data)


def scribbled_index(path: Path) -> None:
    """Where reading the tables in their order does not come by."""
    connection = sqlite3.connect(path)
    (page,) = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_resources_1'"
    ).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    data = bytearray(path.read_bytes())
    data[(page - 1) * size : page * size] = bytes(size)
    path.write_bytes(data)


def of_another_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def exposed(path: Path) -> None:
    path.chmod(0o644)


def deleted(path: Path) -> None:
    path.unlink()


DAMAGES = [truncated, emptied, zeroed, scribbled, scribbled_index, of_another_version, exposed, deleted]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_damaged_state_is_replaced_by_the_backup_and_not_trusted(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    await filled(tmp_path)
    damage(tmp_path / "state.db")
    stored = await (state := State(tmp_path)).open()
    await state.close()
    assert not stored.trusted
    assert stored.scopes[SCOPE].resources == RESOURCES
    assert stat.S_IMODE((tmp_path / "state.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_state_lost_together_with_its_backup_removes_nothing_from_the_host(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
    damage(tmp_path / "state.db")
    damage(tmp_path / "state.backup.db")
    async with Node(tmp_path, node.wireguard) as again:
        await again.reconciler.recheck()
        assert len(again.present()) == 20
        assert (again.reconciler.hello().epoch, again.reconciler.hello().revisions) == ("", {})
        await again.send(welcome(), snapshot([INTERFACE, *PEERS[:15]], 2))
        assert len(again.present()) == 15


async def test_old_backup_serves_peers_but_removes_none_until_the_controller_has_spoken(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS[:5]]))
        backup = (tmp_path / "state.backup.db").read_bytes()
        await node.send(delta(1, 2, PEERS[5:]))
    (tmp_path / "state.backup.db").write_bytes(backup)
    zeroed(tmp_path / "state.db")
    async with Node(tmp_path, node.wireguard) as again:
        await again.reconciler.recheck()
        assert len(again.present()) == 20
        assert again.reconciler.hello().revisions == {}
    async with Node(tmp_path) as rebooted:
        assert len(rebooted.present()) == 5


async def test_full_disk_acknowledges_nothing_keeps_serving_and_heals(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        database = node.state._database()
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        many = [peer(number) for number in range(100, 600)]
        (answer,) = await node.send(delta(1, 2, many))
        assert isinstance(answer, Resync)
        assert "store" in answer.reason
        assert node.reconciler.hello().revisions == {SCOPE: 1}
        assert len(node.present()) == 20
        assert node.counters.store_errors == 1
        await node.send(snapshot([INTERFACE, *PEERS, *many], 2))
        assert len(node.present()) == 20
        await until(lambda: sum(isinstance(frame, Resync) for frame in node.frames) == 2)
        database.execute("PRAGMA max_page_count = 100000")
        (answer,) = await node.send(snapshot([INTERFACE, *PEERS, *many], 2))
        assert answer == Applied(scope=SCOPE, revision=2, digest=digest([INTERFACE, *PEERS, *many]))


async def test_full_disk_keeps_nobody_who_was_revoked(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        database = node.state._database()
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        many = [peer(number) for number in range(100, 600)]
        (answer,) = await node.send(delta(1, 2, many, removals=PEERS[:1]))
        assert isinstance(answer, Resync)
        assert node.present() == {item.public_key for item in PEERS[1:]}
        assert node.reconciler.hello().revisions == {SCOPE: 1}
        await node.send(snapshot([INTERFACE, *PEERS[2:], *many], 3))
        assert node.present() == {item.public_key for item in PEERS[2:]}
        await node.send(delta(3, 4, removals=PEERS[2:3]))
        await node.reconciler.recheck()
        assert node.present() == {item.public_key for item in PEERS[3:]}
        assert not any(isinstance(frame, Applied) and frame.revision > 1 for frame in node.frames)
    async with Node(tmp_path, node.wireguard) as again:  # the disk knows nothing of it, the controller says it again
        assert isinstance((await again.send(welcome(), delta(1, 2, removals=PEERS[:1])))[-1], Applied)
        assert again.present() == {item.public_key for item in PEERS[1:]}


async def test_full_disk_keeps_nobody_of_a_scope_that_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise StateError("database or disk is full")

    async with Node(tmp_path) as node:
        await node.send(welcome(SCOPE, "other"), snapshot([INTERFACE, *PEERS[:15]]))
        await node.send(snapshot(PEERS[15:], scope="other"))
        assert len(node.present()) == 20
        with monkeypatch.context() as patch:
            patch.setattr(node.state, "drop", full)
            await node.send(welcome(SCOPE))
        assert node.present() == {item.public_key for item in PEERS[:15]}
        await node.send(welcome(SCOPE))
        assert "other" not in node.reconciler.hello().revisions


@pytest.mark.parametrize("logged", [False, True])
async def test_state_that_can_only_be_read_is_served_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: bool
) -> None:
    """The disk was full, or read-only, when the host came up."""
    async with Node(tmp_path) as node:
        await node.send(welcome(), snapshot([INTERFACE, *PEERS]), delta(1, 2, removals=PEERS[:1]))
        number = await node.state.next_sequence()
        power_lost = copied(tmp_path)
    if logged:
        power_lost()

    def full(_path: Path, *, create: bool = False) -> sqlite3.Connection:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("agent.state._connect", full)
        rebooted = await Node(tmp_path).__aenter__()
        assert rebooted.present() == {item.public_key for item in PEERS[1:]}
        assert rebooted.reconciler.hello().revisions == {SCOPE: 2}
        answers = await rebooted.send(welcome(), delta(2, 3, [peer(99)], removals=PEERS[1:2]))
        assert isinstance(answers[-1], Resync)
        assert rebooted.present() == {item.public_key for item in PEERS[2:]}
        with pytest.raises(StateError):
            await rebooted.state.next_sequence()
    assert await rebooted.state.next_sequence() > number
    (answer,) = await rebooted.send(delta(2, 3, [peer(99)], removals=PEERS[1:2]))
    assert answer == Applied(scope=SCOPE, revision=3, digest=digest([INTERFACE, *PEERS[2:], peer(99)]))
    await rebooted.__aexit__(None, None, None)
    stored = await (state := State(tmp_path)).open()
    assert (stored.trusted, stored.scopes[SCOPE].revision) == (True, 3)
    assert await state.next_sequence() > number
    await state.close()
    assert not {name for name in os.listdir(tmp_path) if "damaged" in name}  # noqa: PTH208


def copied(directory: Path) -> Callable[[], None]:
    """Keep the state as it is with its log; return what puts it back, as if the host had lost its power now."""
    kept = {path: path.read_bytes() for path in (directory / "state.db", directory / "state.db-wal")}
    assert all(kept.values())

    def put_back() -> None:
        for path, data in kept.items():
            path.write_bytes(data)

    return put_back


def occupy(directory: Path) -> None:
    """Put directories that cannot be replaced where the files belong."""
    for name_ in ("state.db", "state.db.damaged"):
        (directory / name_).mkdir(mode=0o700)
    (directory / "state.db.damaged/file").touch()


async def test_state_that_cannot_be_opened_does_not_keep_the_agent_from_serving(tmp_path: Path) -> None:
    occupy(tmp_path)
    async with Node(tmp_path) as node:
        (answer,) = await node.send(welcome(), snapshot([INTERFACE, *PEERS]))
        assert isinstance(answer, Resync)
        assert node.wireguard.devices == {}


async def test_sequence_grows_over_restarts_and_crashes(tmp_path: Path) -> None:
    await filled(tmp_path)
    numbers = []
    for _ in range(3):
        state = State(tmp_path)
        await state.open()
        numbers += [await state.next_sequence(), await state.next_sequence()]
        await state.close()
    assert numbers == sorted(set(numbers))


async def test_scope_is_dropped_whole(tmp_path: Path) -> None:
    await filled(tmp_path)
    state = State(tmp_path)
    await state.open()
    await state.drop([SCOPE])
    await state.close()
    stored = await (again := State(tmp_path)).open()
    await again.close()
    assert stored.scopes == {}


async def test_unchanged_state_writes_no_backup(tmp_path: Path) -> None:
    await filled(tmp_path)
    before = (tmp_path / "state.backup.db").stat().st_mtime_ns
    state = State(tmp_path)
    await state.open()
    await state.backup()
    await state.close()
    assert (tmp_path / "state.backup.db").stat().st_mtime_ns == before


WRITER = """
import asyncio, sys
from pathlib import Path
from agent.state import State
from tests.agent.fleet import SCOPE, peer, resource

async def main():
    state = State(Path(sys.argv[1]))
    stored = await state.open()
    await state.replace(SCOPE, "e1", 1, [])
    for revision in range(2, 100_000):
        await state.change(SCOPE, revision, [resource(peer(revision % 5000))], [])
        print(revision, flush=True)

asyncio.run(main())
"""


def write_until_killed(directory: Path) -> int:
    """The last revision that the process said it had stored."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITER, str(directory)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        revision = next(int(line) for line in writer.stdout if int(line) >= 200)
        writer.send_signal(signal.SIGKILL)
        return revision


async def test_kill_in_the_middle_of_writing_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    stored_for_sure = await asyncio.to_thread(write_until_killed, tmp_path)
    stored = await (state := State(tmp_path)).open()
    await state.close()
    assert stored.trusted
    scope = stored.scopes[SCOPE]
    assert scope.revision >= stored_for_sure
    assert len(scope.resources) == scope.revision - 1


async def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    state = State(tmp_path / "missing")
    with pytest.raises(StateError, match="missing"):
        await state.open()
    await state.close()
