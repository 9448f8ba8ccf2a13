"""From the API call that kicks or revokes until the last packet that passed, by each protocol, with real clients.

A client pings the internet every two milliseconds (by SSH it downloads without a pause); its own clock, which is the
controller's, tells when the last answer came. OpenVPN and SSH clients are kicked, a WireGuard connection is deleted: it
has no session that could be ended otherwise. L2TP needs another kernel: it is kicked in the virtual machine. How slow
that is tell OpenVPN's kick, which is measured in both, and an echo by TCP.

python -m bench.kick    # inside the virtual machine: prints the results as JSON in one line
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.harness import MARK, Goal, Result, absolute, dump_results, not_measured, percentile
from bench.kernel import in_guest
from tests.fleet.fourways import FourWays, four_ways
from tests.fleet.installation import INTERNET, NODE, make_template
from tests.fleet.serving import Serving
from tests.support.netns import wait_until

ROW = "kick"
_GOALS = {"wireguard": 50, "openvpn": 50, "ssh": 300}  # milliseconds, p99
_L2TP_GOAL = 300
_KICK, _THERE = "kick, API call → traffic stops", "in the emulated guest"
_ECHOES = 500
_EVERY = "0.002"
_FLOWING = 50  # answers, before somebody is kicked
_ANSWER = re.compile(r"^\[(\d+\.\d+)\] \d+ bytes from", re.MULTILINE)
# Downloads through a SOCKS proxy without a pause; tells when the last bytes came.
_DOWNLOAD = """
import socket, sys, time
proxy, host, port = sys.argv[1].split(":"), sys.argv[2], int(sys.argv[3])
peer = socket.create_connection((proxy[0], int(proxy[1])))
peer.sendall(b"\\x05\\x01\\x00")
assert peer.recv(2) == b"\\x05\\x00"
peer.sendall(b"\\x05\\x01\\x00\\x01" + socket.inet_aton(host) + port.to_bytes(2, "big"))
assert peer.recv(10)[1] == 0
peer.sendall(b"GET /100000000000 HTTP/1.0\\r\\n\\r\\n")
last, told = 0.0, False
try:
    while peer.recv(65536):
        last = time.time()
        if not told:
            print("flows", flush=True)
            told = True
except OSError:
    pass
print(last, flush=True)
"""


def measure(*, quick: bool) -> list[Result]:
    rounds = 3 if quick else 20
    with tempfile.TemporaryDirectory(prefix="skynetvpn-kick-") as name, ExitStack() as stack:
        directory = Path(name)
        (directory / "template").mkdir()
        serving = Serving(make_template(directory / "template"), directory, stack, ",".join(_GOALS))
        users = serving.admin("GET", "/users")["users"]
        alice = next(user["id"] for user in users if user["username"] == "alice")
        results = []
        for protocol, goal in _GOALS.items():
            taken = [_kicked(serving, protocol, alice) for _ in range(rounds)]
            what = "DELETE of a connection, API call → traffic stops" if protocol == "wireguard" else _KICK
            measure = f"{what}, {protocol}"
            results += [
                absolute(ROW, f"{measure}, p50", "ms", percentile(taken, 0.5)),
                absolute(ROW, f"{measure}, p99", "ms", percentile(taken, 0.99), goal=Goal(at_most=goal)),
            ]
    if quick:  # without a virtual machine
        return results
    there = in_guest(ROW, f"{_KICK}, l2tp", "bench.kick", cpus=2, quick=False)
    return [*results, *there, *_as_outside(results, there)]


def _as_outside(here: list[Result], there: list[Result]) -> list[Result]:
    """L2TP's kick by a processor that is not emulated: divided by how much slower OpenVPN's is there."""
    found = {result.measure: result.ours for result in (*here, *there) if result.ours is not None}
    slow, fast = found.get(f"{_KICK}, openvpn, {_THERE}, p50"), found.get(f"{_KICK}, openvpn, p50")
    worst = found.get(f"{_KICK}, l2tp, {_THERE}, p99")
    measure = f"{_KICK}, l2tp, p99, divided by how much slower OpenVPN's is in the guest"
    if not slow or not fast or worst is None:
        return [not_measured(ROW, measure, "one of the three figures is missing")]
    return [absolute(ROW, measure, "ms", worst * fast / slow, goal=Goal(at_most=_L2TP_GOAL))]


def in_the_guest(rounds: int) -> list[Result]:
    """OpenVPN beside it, which is measured outside as well, tells how slow this processor is; so does the echo."""
    with four_ways(("wireguard", "openvpn", "l2tp")) as ways:
        echoes = _echoes(ways)
        taken: dict[str, list[float]] = {"openvpn": [], "l2tp": []}
        for _ in range(rounds):
            for protocol, connect in (("openvpn", ways.openvpn), ("l2tp", ways.l2tp)):
                taken[protocol].append(_kicked_there(ways, protocol, connect()))
    named = {f"{_KICK}, {protocol}": found for protocol, found in taken.items()} | {"an echo by TCP": echoes}
    return [
        absolute(ROW, f"{measure}, {_THERE}, {words}", "ms", percentile(found, share))
        for measure, found in named.items()
        for words, share in (("p50", 0.5), ("p99", 0.99))
    ]


def _kicked_there(ways: FourWays, protocol: str, interface: str) -> float:
    """Milliseconds."""
    ways.fleet.wait(lambda: ways.on() == [protocol], f"the session by {protocol} is not listed")
    with ways.pinging(interface, "0.02") as pings:
        began = time.time()
        ways.kick()
        ways.fleet.wait(lambda: ways.on() == [], "a kicked session is still listed")
        ways.fleet.wait(ways.ended, "a kicked client is still there")
    return max(pings.answers()[-1] - began, 0.0) * 1000


def _echoes(ways: FourWays) -> list[float]:
    """Milliseconds of each, between the client and the node."""
    with ways.fleet.node.namespace.entered():
        listener = socket.create_server((NODE, 7))
    with ways.fleet.client.namespace.entered():
        near = socket.create_connection((NODE, 7))
    far, _ = listener.accept()
    with listener, near, far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def answer() -> None:
            while data := far.recv(64):
                far.sendall(data)

        answering = threading.Thread(target=answer)
        answering.start()
        found = []
        for _ in range(_ECHOES):
            began = time.perf_counter()
            near.sendall(b"x" * 64)
            near.recv(64)
            found.append((time.perf_counter() - began) * 1000)
        near.shutdown(socket.SHUT_WR)
        answering.join()
    return found


def _kicked(serving: Serving, protocol: str, account: int) -> float:
    """Milliseconds."""
    connection = serving.connect(protocol)["connection_id"]
    try:
        if protocol == "ssh":
            return _downloading(serving, lambda: serving.admin("POST", f"/users/{account}/kick"))
        if protocol == "wireguard":
            return _pinging(serving, lambda: serving.fleet.call("DELETE", f"/api/connections/{connection}"))
        return _pinging(serving, lambda: serving.admin("POST", f"/users/{account}/kick"))
    finally:
        serving.cli("disconnect")
        serving.wait_on("alice", [])


def _pinging(serving: Serving, end: Callable[[], Any]) -> float:
    with tempfile.TemporaryFile("w+") as output:
        client = serving.fleet.client.namespace
        ping = client.popen("ping", "-n", "-D", "-i", _EVERY, INTERNET, stdout=output, stderr=subprocess.DEVNULL)

        def answers() -> list[float]:
            output.seek(0)
            return [float(moment) for moment in _ANSWER.findall(output.read())]

        wait_until(lambda: len(answers()) >= _FLOWING, 30)
        began = time.time()
        end()
        time.sleep(0.5)  # so long somebody who is not out would go on
        client.end(ping)
        return max(answers()[-1] - began, 0.0) * 1000


def _downloading(serving: Serving, end: Callable[[], Any]) -> float:
    argv = (sys.executable, "-c", _DOWNLOAD, "127.0.0.1:1080", INTERNET, "8000")
    client = serving.fleet.client.namespace.popen(*argv, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "flows\n"
    began = time.time()
    end()
    last = float(client.stdout.readline())
    client.wait(10)
    return max(last - began, 0.0) * 1000


if __name__ == "__main__":
    print(MARK + dump_results(in_the_guest(3 if "--quick" in sys.argv else 20)))
