"""From the API call that kicks or revokes until the last packet that passed, by each protocol, with real clients.

A client pings the internet every two milliseconds (by SSH it downloads without a pause); its own clock, which is the
controller's, tells when the last answer came. OpenVPN and SSH clients are kicked, a WireGuard connection is deleted: it
has no session that could be ended otherwise. L2TP is not on this kernel; tests/kernel kicks it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.harness import Goal, Result, absolute, percentile
from tests.fleet.installation import INTERNET, make_template
from tests.fleet.serving import Serving
from tests.support.netns import wait_until

ROW = "kick"
_GOALS = {"wireguard": 50, "openvpn": 50, "ssh": 300}  # milliseconds, p99
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
            what = "DELETE of a connection" if protocol == "wireguard" else "kick"
            measure = f"{what}, API call → traffic stops, {protocol}"
            results += [
                absolute(ROW, f"{measure}, p50", "ms", percentile(taken, 0.5)),
                absolute(ROW, f"{measure}, p99", "ms", percentile(taken, 0.99), goal=Goal(at_most=goal)),
            ]
        return results


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
