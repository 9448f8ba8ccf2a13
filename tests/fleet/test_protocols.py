"""One account by several protocols: in, counted, limited, and out when it should be. Real clients and servers.

L2TP needs a kernel that has it: tests/kernel.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest

from tests.fleet.installation import Template
from tests.fleet.serving import PROXY, Serving

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

MEGABYTE = 1_000_000


def counted(serving: Serving) -> dict[str, int]:
    """Bytes to the client, as the API shows them."""
    rows = {row["protocol"]: row["tx"] for row in serving.fleet.live().values()}
    return {"ssh": rows["ssh"], "tunnels": rows["wireguard"] + rows["openvpn"]}


def sent(serving: Serving) -> int:
    """Bytes that the node has sent into its tunnels, by its devices."""
    devices = [line.split() for line in serving.fleet.node.run("cat", "/proc/net/dev").splitlines()]
    return sum(int(columns[9]) for columns in devices if columns[0].startswith(("sky0:", "tun")))


@pytest.fixture(scope="module")
def serving(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with ExitStack() as stack:
        yield Serving(template, tmp_path_factory.mktemp("serving"), stack, "wireguard,openvpn,ssh")


@pytest.fixture(autouse=True)
def nobody_stays(serving: Serving) -> Iterator[None]:
    yield
    serving.end_clients()


def test_one_account_is_on_by_every_protocol_and_a_kick_ends_each(serving: Serving) -> None:
    fleet = serving.fleet
    number = next(user["id"] for user in serving.admin("GET", "/users")["users"] if user["username"] == "alice")
    for protocol in ("ssh", "wireguard", "openvpn"):
        serving.connect(protocol)
    serving.wait_on("alice", ["openvpn", "ssh", "wireguard"])
    before, sent_before = counted(serving), sent(serving)
    assert serving.by_proxy(3 * MEGABYTE) == 3 * MEGABYTE
    assert serving.download(2 * MEGABYTE) == 2 * MEGABYTE  # by whichever tunnel has the default route
    fleet.wait(
        lambda: all(counted(serving)[name] - before[name] > size for name, size in (("ssh", 3e6), ("tunnels", 2e6))),
        "the bytes are not reported",
    )
    # The node's own devices know how much it was: what is lost on the way is sent, and counted, again.
    moved, truly = counted(serving)["tunnels"] - before["tunnels"], sent(serving) - sent_before
    assert truly <= moved < 1.1 * truly + 10_000
    assert counted(serving)["ssh"] - before["ssh"] < 3.4 * MEGABYTE
    shown = serving.admin("GET", "/monitoring/users")
    assert {one["ip_address"] for one in shown["connections"]} == {"192.0.2.2"}
    began = time.monotonic()
    assert serving.admin("POST", f"/users/{number}/kick") == {"kicked": 3}
    serving.wait_on("alice", [])
    print(f"three sessions ended {time.monotonic() - began:.2f} s after the call")
    assert serving.by_proxy(MEGABYTE, seconds=3) == 0


def test_the_accounts_own_name_and_password_let_in_by_ssh_until_they_do_not(serving: Serving) -> None:
    path = serving.user("dana", "ssh", "l2tp")
    serving.ended(serving.ssh("dana", "a wrong guess"))
    assert serving.on("dana") == []
    client = serving.ssh("dana")
    serving.wait_on("dana", ["ssh"])
    assert serving.by_proxy(MEGABYTE) == MEGABYTE
    began = time.monotonic()
    serving.admin("PUT", path, {"active": False})
    serving.ended(client)
    print(f"a deactivated account's session ended {time.monotonic() - began:.2f} s after the call")
    serving.ended(serving.ssh("dana"))
    serving.admin("PUT", path, {"active": True, "password": "another good one"})
    serving.ended(serving.ssh("dana"))  # the old password
    serving.ssh_until_on("dana", "another good one")


def test_a_quota_of_ten_megabytes_lets_at_most_one_slice_more_pass(serving: Serving) -> None:
    path = serving.user("erin", "ssh", quota_bytes=10 * MEGABYTE)
    serving.ssh("erin")
    serving.wait_on("erin", ["ssh"])
    passed, deadline = 0, time.monotonic() + 120
    while serving.on("erin"):
        assert time.monotonic() < deadline, f"{passed} bytes passed, and it is still on\n{serving.fleet.logs()}"
        passed += serving.by_proxy(30 * MEGABYTE, seconds=20)  # it slows down as the quota nears its end
    print(f"{passed} bytes passed of a quota of {10 * MEGABYTE}")
    assert 8 * MEGABYTE < passed <= 11 * MEGABYTE
    serving.ended(serving.ssh("erin"))
    assert serving.used(path) >= 10 * MEGABYTE
    serving.admin("PUT", path, {"quota_bytes": 50 * MEGABYTE})
    serving.ssh_until_on("erin")
    assert serving.by_proxy(5 * MEGABYTE, seconds=60) == 5 * MEGABYTE


def test_an_account_ends_at_its_moment_also_when_the_controller_is_away(serving: Serving) -> None:
    fleet = serving.fleet
    ends = datetime.now(UTC) + timedelta(seconds=12)
    serving.user("finn", "ssh", expires_at=ends.isoformat())
    client = serving.ssh("finn")
    serving.wait_on("finn", ["ssh"], 10)
    fleet.stop_controller(signal.SIGKILL)
    try:
        assert client.poll() is None
        serving.ended(client)
        late = (datetime.now(UTC) - ends).total_seconds()
        print(f"the session ended {late:.2f} s after the account")
        assert -1 < late < 2  # a lease ends with a whole second
    finally:
        fleet.start_controller()
        fleet.stop_agent()  # it has tried for so long that its next try may be half a minute away
        serving.start_agent()
        fleet.wait_online()


def test_sessions_outlive_a_killed_agent_and_no_byte_is_lost_or_counted_twice(serving: Serving) -> None:
    fleet = serving.fleet
    path = serving.user("gwen", "ssh", quota_bytes=1000 * MEGABYTE)
    clients = [serving.ssh("gwen"), serving.ssh("gwen", proxy="127.0.0.1:1081")]
    serving.wait_on("gwen", ["ssh", "ssh"])
    openvpn = serving.connect("openvpn")
    assert serving.by_proxy(2 * MEGABYTE) == 2 * MEGABYTE
    fleet.stop_agent(signal.SIGKILL)
    assert serving.by_proxy(3 * MEGABYTE) == 3 * MEGABYTE
    assert serving.download(2 * MEGABYTE) == 2 * MEGABYTE
    serving.start_agent()
    fleet.wait(lambda: serving.used(path) > 5 * MEGABYTE, "what passed meanwhile is not counted")
    assert serving.by_proxy(MEGABYTE, "127.0.0.1:1081") == MEGABYTE
    fleet.wait(lambda: serving.used(path) > 6 * MEGABYTE, "what passes now is not counted")
    assert serving.used(path) < 6.5 * MEGABYTE
    assert [client.poll() for client in clients] == [None, None]
    serving.wait_on("gwen", ["ssh", "ssh"])
    fleet.wait(lambda: fleet.live()[openvpn["connection_id"]]["tx"] > 2 * MEGABYTE, "OpenVPN's bytes are not counted")
    assert fleet.live()[openvpn["connection_id"]]["tx"] < 3.5 * MEGABYTE  # with what was lost on the way


def test_the_newest_session_over_the_limit_goes(serving: Serving) -> None:
    serving.user("hugo", "ssh", max_sessions=1)
    first = serving.ssh("hugo")
    serving.wait_on("hugo", ["ssh"])
    second = serving.ssh("hugo", proxy="127.0.0.1:1082")
    serving.ended(second)
    assert first.poll() is None
    assert serving.on("hugo") == ["ssh"]


def test_a_server_that_cannot_start_says_so_and_the_others_go_on(serving: Serving) -> None:
    fleet = serving.fleet
    with fleet.node.namespace.entered():
        taken = socket.create_server(("0.0.0.0", 2223))
    with taken:
        serving.connect("openvpn")
        began = time.monotonic()
        assert serving.admin("PUT", "/protocols/ssh", {"port": 2223})["status"] in ("applying", "error")
        fleet.wait(lambda: serving.statuses("error") == ["ssh"], "the panel does not say that SSH fails")
        print(f"the panel says so {time.monotonic() - began:.2f} s after the change")
        assert "in use" in fleet.nodes()
        assert set(serving.statuses("running")) >= {"wireguard", "openvpn"}
        assert serving.download(MEGABYTE) == MEGABYTE
        refused = serving.admin("PUT", "/protocols/ssh", {"settings": {"shell": True}}, 400)
        assert "shell" in refused["detail"]
    serving.admin("PUT", "/protocols/ssh", {"port": 2222})
    fleet.wait(lambda: "ssh" in serving.statuses("running"), "SSH does not recover")


def test_a_protocol_that_the_settings_no_longer_name_is_stopped(serving: Serving) -> None:
    fleet = serving.fleet
    serving.user("iris", "ssh")
    client = serving.ssh("iris")
    serving.wait_on("iris", ["ssh"])
    openvpn = serving.connect("openvpn")
    fleet.stop_agent()
    assert client.poll() is None
    serving.start_agent("wireguard,openvpn")
    serving.ended(client)
    serving.ended(serving.ssh("iris"))
    fleet.wait(lambda: "server_given_up" in fleet.logs(), "the agent does not say that it stopped SSH")
    fleet.wait(lambda: serving.on("iris") == [], "the session is still shown")
    assert "iris" not in fleet.node.run("cat", "/etc/passwd")
    assert serving.download(MEGABYTE) == MEGABYTE
    assert fleet.live()[openvpn["connection_id"]]["status"] == "connected"
    fleet.stop_agent()
    serving.start_agent()
    fleet.wait(lambda: "ssh" in serving.statuses("running"), "SSH does not come back")
    serving.ssh("iris")
    serving.wait_on("iris", ["ssh"])


def test_a_speed_limit_holds_on_every_protocol(serving: Serving) -> None:
    number = next(user["id"] for user in serving.admin("GET", "/users")["users"] if user["username"] == "alice")
    serving.admin("PUT", f"/users/{number}", {"rate_down": 8_000_000})
    try:
        for protocol, way in (("openvpn", ()), ("ssh", ("--socks5-hostname", PROXY))):
            serving.connect(protocol)
            began = time.monotonic()
            assert serving.download(4 * MEGABYTE, *way, seconds=60) == 4 * MEGABYTE
            seconds = time.monotonic() - began
            print(f"4 MB at 8 Mbit/s by {protocol}: {seconds:.1f} s")
            assert seconds > 2.5
            serving.cli("disconnect")
    finally:
        serving.admin("PUT", f"/users/{number}", {"rate_down": None})


def test_a_tunnel_by_ssh_is_counted_limited_and_ended_like_all_others(serving: Serving) -> None:
    fleet = serving.fleet
    number = next(user["id"] for user in serving.admin("GET", "/users")["users"] if user["username"] == "alice")
    serving.admin("PUT", "/protocols/ssh", {"settings": {"tcp_forwarding": False, "tun": True}})
    try:
        fleet.wait(lambda: "ssh" in serving.statuses("running"), "tun devices are not served")
        tunnel = serving.connect("ssh")
        assert tunnel["interface"].startswith("skyvpn") and tunnel["addresses"][0].startswith("10.68.")
        assert serving.download(3 * MEGABYTE) == 3 * MEGABYTE

        def told() -> int:
            count: int = fleet.live()[tunnel["connection_id"]]["tx"]
            return count

        fleet.wait(lambda: told() > 3 * MEGABYTE, "the bytes are not reported")
        fleet.stop_agent(signal.SIGKILL)
        assert serving.download(2 * MEGABYTE) == 2 * MEGABYTE
        serving.start_agent()
        fleet.wait(lambda: told() > 5 * MEGABYTE, "what passed meanwhile is not counted")
        assert told() < 6 * MEGABYTE
        serving.admin("PUT", f"/users/{number}", {"rate_down": 8_000_000})
        fleet.wait(
            lambda: "htb" in fleet.node.run("tc", "class", "show", "dev", "skydown", check=False), "nothing is limited"
        )
        began = time.monotonic()
        assert serving.download(4 * MEGABYTE, seconds=60) == 4 * MEGABYTE
        assert time.monotonic() - began > 2.5
        assert serving.admin("POST", f"/users/{number}/kick") == {"kicked": 1}
        serving.wait_on("alice", [])
        links = fleet.client.namespace.run("ip", "-o", "link")
        assert tunnel["interface"] not in links
    finally:
        serving.admin("PUT", f"/users/{number}", {"rate_down": None})
        serving.admin("PUT", "/protocols/ssh", {"settings": {"tcp_forwarding": None, "tun": None}})
    fleet.wait(lambda: "tun190" not in fleet.node.run("ip", "-o", "link"), "the devices are still there")
