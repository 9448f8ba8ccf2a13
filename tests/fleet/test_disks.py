"""Full disks: nothing is acknowledged that is not stored, tunnels go on, and it heals when there is space again."""

from __future__ import annotations

import pytest

from shared.keys import PrivateKey
from tests.fleet.installation import INTERFACE, INTERNET, Installation

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

SIZE = "6m"


@pytest.fixture(scope="module")
def fleet(prepared: Installation) -> Installation:
    """With both services on file systems of a few megabytes."""
    for host, home in ((prepared.controller, prepared.home), (prepared.node, prepared.agent_home)):
        prepared.small_disk(host, home, SIZE)
    prepared.copy_template()
    prepared.begin()
    return prepared


def acknowledged(fleet: Installation) -> float:
    """The revision that the node has told the controller to have."""
    return fleet.agent_metric("skynetvpn_agent_applied_revision", scope=f"node:{fleet.server_id}")


def test_controller_without_space_accepts_nothing_and_tunnels_go_on(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel, tunnel.stream(INTERNET) as stream:
        before, peers = fleet.live().keys(), fleet.peers()
        with fleet.full_disk(fleet.controller, fleet.home):
            for _ in range(5):
                refused = fleet.post_connection(PrivateKey.generate())
                assert (refused.status, "Retry-After" in refused.headers) == (503, True), refused.body
            kept = fleet.delete_connection(mine.id)
            assert (kept.status, "Retry-After" in kept.headers) == (503, True), kept.body
            assert fleet.live().keys() == before  # what only reads still answers
            assert fleet.peers() == peers
            stream.flows()
        again = fleet.connect()
        assert fleet.live().keys() == before | {again.id}
        counted = fleet.live()[mine.id]["tx"]
        fleet.wait(lambda: fleet.live()[mine.id]["tx"] > counted, "traffic is no longer counted")
        stream.flows()
    assert stream.lost() == set()
    assert fleet.delete_connection(mine.id).headers["X-Applied"] == "true"
    assert fleet.metric("skynetvpn_node_drift_total", node="fra1") == 0


def test_agent_without_space_acknowledges_nothing_and_catches_up(fleet: Installation) -> None:
    mine, leaving = fleet.connect(), fleet.connect()
    with fleet.tunnel(mine) as tunnel, tunnel.stream(INTERNET) as stream:
        peers, revision = fleet.peers(), acknowledged(fleet)
        with fleet.full_disk(fleet.node, fleet.agent_home):
            key = PrivateKey.generate()
            made = fleet.post_connection(key, query="")
            assert made.status == 201  # the controller has stored it, and will see it through
            fleet.wait(lambda: fleet.agent_metric("skynetvpn_agent_store_errors_total") > 0, "nothing fails")
            assert str(key.public()) not in fleet.peers(), "applied, but not stored: a restart would undo it"
            assert fleet.live()[made.json["connection_id"]]["status"] == "connecting"
            assert fleet.call("DELETE", f"/api/connections/{leaving.id}").status == 200
            fleet.wait(lambda: leaving.public_key not in fleet.peers(), "the disk keeps somebody who was revoked")
            assert acknowledged(fleet) == revision
            assert "state_not_stored" in fleet.agent_log.read_text()
            assert fleet.peers().keys() == peers.keys() - {leaving.public_key}
            stream.flows()
        took = fleet.wait(lambda: str(key.public()) in fleet.peers(), "the change does not arrive")
        fleet.wait(lambda: acknowledged(fleet) == revision + 2, "the changes are not acknowledged")
        print(f"caught up {took:.2f} s after there was space")
        assert fleet.connect().public_key in fleet.peers()
        stream.flows()
    assert stream.lost() == set()


def test_agent_without_space_starts_and_serves_what_it_has(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel, tunnel.stream(INTERNET) as stream:
        peers = fleet.peers()
        with fleet.full_disk(fleet.node, fleet.agent_home):
            fleet.stop_agent()
            fleet.start_agent()
            fleet.wait_online()
            assert fleet.peers() == peers
            stream.flows()
        assert fleet.connect().public_key in fleet.peers()
    assert stream.lost() == set()


def test_host_without_tunnels_and_space_serves_what_its_disk_knows(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel:
        peers, revision = fleet.peers(), acknowledged(fleet)
        fleet.stop_agent()  # which ends the log of its state: there is no room for another one
        with fleet.full_disk(fleet.node, fleet.agent_home):
            fleet.node.run("ip", "link", "delete", INTERFACE)  # and with it wireguard-go
            fleet.start_agent()
            fleet.wait(lambda: fleet.peers() == peers, "the peers are not back")
            assert "state_only_readable" in fleet.agent_log.read_text()
            tunnel.restart()
            fleet.wait(lambda: tunnel.reaches(INTERNET), "packets do not pass the host")
        fleet.wait_online()
        fleet.wait(lambda: acknowledged(fleet) == revision, "the node has lost its state")
        assert fleet.connect().public_key in fleet.peers()
    assert not {"state.db.damaged", "ledger.db.damaged"} & set(fleet.node.run("ls", str(fleet.agent_home)).split())
