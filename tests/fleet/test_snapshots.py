"""A controller whose database is not the one that it was: the node keeps serving until an operator has looked."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from controller.config import read_secrets
from shared.desired import Kind, decode, digest
from tests.fleet.installation import INTERNET, Connected, Installation
from tests.fleet.tunnel import Tunnel

pytestmark = [pytest.mark.netns, pytest.mark.timeout(90)]

CONNECTIONS = 12  # more than the guard's least number
NEW_EPOCH = "UPDATE facts SET value = '{}' WHERE name = 'epoch'"


@pytest.fixture(scope="module")
def connected(fleet: Installation) -> list[Connected]:
    return [fleet.connect() for _ in range(CONNECTIONS)]


@pytest.fixture(scope="module")
def tunnel(fleet: Installation, connected: list[Connected]) -> Iterator[Tunnel]:
    with fleet.tunnel(connected[0]) as made:
        yield made


@pytest.fixture
def genuine(fleet: Installation, connected: list[Connected], tunnel: Tunnel) -> Iterator[Path]:
    """The database as it is now, with the controller stopped; it is put back afterwards, and the node is content."""
    kept = fleet.directory / "genuine.db"
    keep(fleet, kept)
    fleet.stop_controller()
    yield kept
    fleet.stop_controller()
    put(fleet, kept)
    edit(fleet, NEW_EPOCH.format(uuid.uuid4()))  # as a restore has to do: the nodes then know that history ended
    fleet.start_controller()
    fleet.wait_online()
    fleet.wait(lambda: fleet.peers().keys() == {one.public_key for one in connected}, "not as it was before")
    tunnel.restart()  # a peer that was away has forgotten its session; the client would notice after 15 s
    fleet.wait(lambda: tunnel.reaches(INTERNET), "packets do not pass again")


def keep(fleet: Installation, path: Path) -> None:
    """Copy the database as an operator's backup does, beside the running controller."""
    with closing(sqlite3.connect(fleet.home / "controller.db")) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)


def put(fleet: Installation, path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        (fleet.home / f"controller.db{suffix}").unlink(missing_ok=True)
    (fleet.home / "controller.db").write_bytes(path.read_bytes())


def edit(fleet: Installation, statement: str) -> None:
    with closing(sqlite3.connect(fleet.home / "controller.db")) as database, database:
        assert database.execute(statement).rowcount > 0


def forget_peers(fleet: Installation) -> None:
    """A consistent history in which nobody is connected."""
    with closing(sqlite3.connect(fleet.home / "controller.db")) as database, database:
        database.execute("DELETE FROM desired WHERE kind = ?", (Kind.WIREGUARD_PEER,))
        left = database.execute("SELECT scope, kind, key, payload FROM desired").fetchall()
        secrets = read_secrets(fleet.home / "secret.key")
        resources = [
            decode(kind, key, secrets.open(sealed, table="desired", column="payload", row=f"{scope}/{kind}/{key}"))
            for scope, kind, key, sealed in left
        ]
        database.execute("UPDATE scopes SET digest = ?", (digest(resources),))


def refused(fleet: Installation, words: str) -> None:
    """The node has said no, in its own words, and serves as before."""
    fleet.start_controller()
    fleet.wait_online()
    fleet.wait(lambda: fleet.metric("skynetvpn_node_refused_snapshots_total", node="fra1") >= 1, "nothing is refused")
    fleet.wait_told(words)
    assert "channel.snapshot_refused" in fleet.controller_log.read_text()
    assert len(fleet.peers()) == CONNECTIONS


def test_poisoned_snapshot_changes_nothing_until_an_operator_confirms_it(
    fleet: Installation, genuine: Path, tunnel: Tunnel
) -> None:
    with tunnel.stream(INTERNET) as stream:
        forget_peers(fleet)
        edit(fleet, NEW_EPOCH.format(uuid.uuid4()))
        refused(fleet, f"would remove {CONNECTIONS} of {CONNECTIONS} peers")
        stream.flows()
    assert stream.lost() == set()
    fleet.command("node", "confirm", "fra1")
    fleet.wait(lambda: fleet.peers() == {}, "the confirmed snapshot is not applied")
    fleet.wait_told("would remove", now=False)


def test_empty_database_of_the_same_authority_takes_nothing_from_the_node(
    fleet: Installation, genuine: Path, tunnel: Tunnel
) -> None:
    for suffix in ("", "-wal", "-shm"):
        (fleet.home / f"controller.db{suffix}").unlink(missing_ok=True)
    before = fleet.agent_log.stat().st_size
    with tunnel.stream(INTERNET) as stream:
        fleet.start_controller()

        def told() -> bool:
            with fleet.agent_log.open() as log:
                log.seek(before)
                return "certificate" in log.read()

        fleet.wait(told, "the agent is not refused")
        assert len(fleet.peers()) == CONNECTIONS
        stream.flows()
    assert stream.lost() == set()


def test_older_copy_of_the_database_undoes_nothing_until_an_operator_confirms_it(
    fleet: Installation, genuine: Path, tunnel: Tunnel, connected: list[Connected]
) -> None:
    """A file that was copied back has the epoch it had: only the revisions tell that it is old."""
    fleet.start_controller()
    fleet.wait_online()
    later = fleet.connect()
    fleet.stop_controller()
    put(fleet, genuine)
    fleet.start_controller()
    fleet.wait_online()
    fleet.wait_told("is older than")
    assert later.public_key in fleet.peers()
    assert tunnel.reaches(INTERNET)
    fleet.command("node", "confirm", "fra1")
    fleet.wait(lambda: fleet.peers().keys() == {one.public_key for one in connected}, "the older state is not applied")
    assert tunnel.reaches(INTERNET)
    again = fleet.connect()  # what comes after it arrives in the ordinary way
    assert fleet.delete_connection(again.id).headers["X-Applied"] == "true"
