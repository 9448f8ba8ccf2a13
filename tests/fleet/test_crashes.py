"""Processes that are killed, and a host that reboots: tunnels go on, and nothing is missing or double afterwards."""

from __future__ import annotations

import http.client
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from shared.keys import PrivateKey
from tests.fleet.installation import INTERFACE, INTERNET, Connected, Installation

pytestmark = [pytest.mark.netns, pytest.mark.timeout(90)]

CLIENTS = 3
ROUNDS = 2


@dataclass(slots=True)
class Churn:
    """Clients that connect and disconnect all the time, and remember what was acknowledged."""

    fleet: Installation
    stop: threading.Event = field(default_factory=threading.Event)
    created: dict[str, str] = field(default_factory=dict)  # id -> public key
    ending: set[str] = field(default_factory=set)  # a DELETE was sent
    ended: set[str] = field(default_factory=set)  # and acknowledged

    def run(self, number: int) -> None:
        mine: list[str] = []
        while not self.stop.is_set():
            try:
                key = PrivateKey.generate()
                made = self.fleet.post_connection(key, query="")
                if made.status == 400 and b"offline" in made.body:  # the node has not come back yet
                    raise ConnectionError
                assert made.status == 201, made.body
                mine.append(made.json["connection_id"])
                self.created[mine[-1]] = str(key.public())
                if len(mine) > number + 2:
                    victim = mine.pop(0)
                    self.ending.add(victim)
                    assert self.fleet.call("DELETE", f"/api/connections/{victim}").status == 200
                    self.ended.add(victim)
            except (OSError, http.client.HTTPException):
                if self.stop.wait(0.02):  # the controller is away
                    return

    def made(self, working: list[Future[None]], goal: int) -> bool:
        """Whether so many connections were made; raise what ended a client."""
        for work in working:
            if work.done():
                work.result()
        return len(self.created) >= goal


def agree(fleet: Installation) -> bool:
    """Whether the node has exactly the API's live connections, by their addresses."""
    wanted = sorted(sorted(row["addresses"]) for row in fleet.live().values())
    return sorted(sorted(addresses) for addresses in fleet.peers().values()) == wanted


def unharmed(fleet: Installation) -> bool:
    """Whether nobody found anything else than what should be there."""
    seen = [fleet.metric(f"skynetvpn_node_{name}_total", node="fra1") for name in ("drift", "refused_snapshots")]
    said = [fleet.agent_metric(f"skynetvpn_agent_{name}_total") for name in ("drift", "refused_snapshots")]
    return not any(seen + said)


def usage(fleet: Installation, connected: Connected) -> tuple[int, int]:
    row = fleet.live()[connected.id]
    return row["rx"], row["tx"]


def stored_usage(fleet: Installation, connected: Connected) -> tuple[int, int]:
    """What a crash of the controller leaves. The API shows what is newer, as long as the controller lives."""
    row: tuple[int, int] = fleet.stored("SELECT rx, tx FROM connections WHERE id = ?", connected.id)
    return row


def test_controller_killed_while_it_pushes_loses_nothing_and_doubles_nothing(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel, tunnel.stream(INTERNET) as stream:
        fleet.wait(lambda: usage(fleet, mine)[1] > 0, "no traffic is counted")
        churn = Churn(fleet)
        before = stored_usage(fleet, mine)
        with ThreadPoolExecutor(CLIENTS) as pool:
            working = [pool.submit(churn.run, number) for number in range(CLIENTS)]
            try:
                for round_ in range(ROUNDS):
                    goal = len(churn.created) + 7 + 4 * round_
                    fleet.wait(lambda goal=goal: churn.made(working, goal), "no connections are made")
                    shown = usage(fleet, mine)
                    fleet.stop_controller(signal.SIGKILL)
                    fleet.start_controller()
                    kept = stored_usage(fleet, mine)
                    assert all(now >= then for now, then in zip(kept, before, strict=True)), "stored usage fell"
                    before = kept
            finally:
                churn.stop.set()
            for work in working:
                work.result()
        fleet.wait_online()
        live = fleet.live().keys()
        assert churn.created.keys() - churn.ending <= live, "an acknowledged connection is missing"
        assert not churn.ended & live, "an acknowledged end is undone"
        fleet.wait(lambda: agree(fleet), "the node and the API do not agree")
        assert {churn.created[one] for one in churn.created.keys() - churn.ending} <= fleet.peers().keys()
        assert unharmed(fleet), fleet.logs()
        fleet.wait(lambda: usage(fleet, mine) > shown, "what was counted before the last crash is lost")
        stream.flows()
    assert stream.lost() == set()
    assert len(stream.answered()) > 100
    print(f"{len(churn.created)} created, {len(churn.ended)} ended, {len(stream.answered())} packets, none lost")


def test_agent_killed_keeps_tunnel_session_counters_and_status(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel, tunnel.stream(INTERNET) as stream:
        fleet.wait(lambda: fleet.live()[mine.id]["status"] == "connected", "the connection is not connected")
        fleet.wait(lambda: usage(fleet, mine)[1] > 0, "no traffic is counted")
        handshakes = sorted(fleet.node.run("wg", "show", INTERFACE, "latest-handshakes").splitlines())
        peers, counted, transferred = fleet.peers(), usage(fleet, mine), tunnel.transfer()
        fleet.stop_agent(signal.SIGKILL)
        fleet.wait(lambda: fleet.metric("skynetvpn_node_up", node="fra1") == 0, "the loss of the link is not seen")
        assert fleet.live()[mine.id]["status"] == "connected"
        stream.flows()
        fleet.start_agent()
        fleet.wait_online()
        fleet.wait(lambda: usage(fleet, mine)[1] > counted[1], "traffic is no longer counted")
        stream.flows()
        assert fleet.live()[mine.id]["status"] == "connected"
        assert usage(fleet, mine)[0] >= counted[0]
        assert fleet.peers() == peers
        assert sorted(fleet.node.run("wg", "show", INTERFACE, "latest-handshakes").splitlines()) == handshakes
        assert tunnel.transfer().handshake == transferred.handshake
        assert tunnel.transfer().received > transferred.received
    assert stream.lost() == set()
    assert unharmed(fleet), fleet.logs()


def test_rebooted_host_serves_from_its_disk_while_the_controller_is_down(fleet: Installation) -> None:
    mine = fleet.connect()
    with fleet.tunnel(mine) as tunnel:
        fleet.wait(lambda: agree(fleet), "the node and the API do not agree")
        fleet.wait(lambda: usage(fleet, mine)[1] > 0, "no traffic is counted")
        peers, counted = fleet.peers(), usage(fleet, mine)
        addresses = fleet.node.run("ip", "-o", "address", "show", INTERFACE).count("scope global")
        fleet.stop_controller()
        fleet.reboot_node()
        assert fleet.peers() == {} and "skynetvpn" not in fleet.node.run("nft", "list", "tables")
        fleet.start_agent()
        cold = fleet.wait(lambda: fleet.peers() == peers, "the peers are not back")
        assert cold < 10
        print(f"cold start of {len(peers)} peers without a controller: {cold:.2f} s")
        assert fleet.node.run("ip", "-o", "address", "show", INTERFACE).count("scope global") == addresses
        tunnel.restart()
        fleet.wait(lambda: tunnel.reaches(INTERNET), "packets do not pass the rebooted host")
        fleet.start_controller()
        fleet.wait_online()
        fleet.wait(lambda: usage(fleet, mine)[1] > counted[1], "traffic is no longer counted")
        assert usage(fleet, mine)[0] >= counted[0]
        assert agree(fleet)
    assert unharmed(fleet), fleet.logs()
