"""Row 8: what the agent costs the packets. iperf3 through its tunnel and through one set by hand, 5,000 peers each.

    client ─── node        the agent's tunnel; the controller is asked for 10 changes a second
    client ─── hand        wireguard-go, `wg setconf` of the same peers, one rule for NAT

While the other tunnel is measured the agent is stopped (SIGSTOP); the controller works on in both halves, because a
node does not share a machine with it. Then the agent is ended, killed and made to forget, while packets pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import material
from bench.harness import Goal, Result, absolute, compared, interleaved, not_measured
from bench.stack import INTERFACE, Stack
from shared.keys import PrivateKey, encode_key
from tests.support.host import Host
from tests.support.netns import wait_until

ROW = "tunnel"
_MEASURE = "iperf3 through the tunnel, {peers:,} peers, 10 changes/s"
_OUTSIDE, _CLIENT = "198.51.100.1", "198.51.100.2"
_NODE_ADDRESS, _PORT = "10.66.0.1", 51820
_CHANGES_PER_SECOND = 10
_REKEY_SECONDS = 110  # WireGuard makes a new handshake by itself after 120
_LOSS = re.compile(r"(\d+) packets transmitted, (\d+) received")


@dataclass(frozen=True, slots=True)
class Client:
    """One tunnel from the client's side."""

    host: Host
    file: Path
    public_key: str
    addresses: list[str]  # inside

    def connect(self) -> None:
        self.host.run("wg", "setconf", "wg0", str(self.file))

    def ping(self) -> None:
        wait_until(lambda: " 1 received" in self.host.namespace.run(*_PING, check=False), 30)

    def iperf(self, seconds: int) -> float:
        """Mbit/s that arrived."""
        argv = ("iperf3", "-c", _NODE_ADDRESS, "-t", str(seconds), "-J")
        told = json.loads(self.host.namespace.run(*argv, timeout=seconds + 30))
        return float(told["end"]["sum_received"]["bits_per_second"]) / 1e6


# What a VPN host has in any case: without it the kernel would not even track connections there.
_NAT = f"""table ip by-hand {{
  chain postrouting {{
    type nat hook postrouting priority srcnat
    ip saddr 10.66.0.0/16 oifname != "{INTERFACE}" masquerade
  }}
}}
"""
_PING = ("ping", "-n", "-q", "-c", "1", "-W", "1", _NODE_ADDRESS)


def measure(*, quick: bool) -> list[Result]:
    peers, seconds, pairs = (500, 1, 3) if quick else (5000, 3, 25)
    title = _MEASURE.format(peers=peers)
    if shutil.which("iperf3") is None:
        return [not_measured(ROW, title, "iperf3 is not installed")]
    with Stack(peers=peers) as stack, ExitStack() as exits:
        ours = _client_of_agent(exits, stack)
        by_hand = _client_by_hand(exits, stack, peers, ours.addresses)
        found = asyncio.run(_throughput(stack, ours, by_hand, seconds, pairs))
        result = compared(ROW, title, "Mbit/s", found, against="the same tunnel by hand", goal=Goal(at_least=0.97))
        return [result, *_interruption(stack, ours)]


async def _throughput(
    stack: Stack, ours: Client, by_hand: Client, seconds: int, pairs: int
) -> list[tuple[float, float]]:
    async def through_agent() -> float:
        return ours.iperf(seconds)

    async def through_hand() -> float:
        assert stack.agent is not None
        stack.agent.send_signal(signal.SIGSTOP)
        try:
            return by_hand.iperf(seconds)
        finally:
            stack.agent.send_signal(signal.SIGCONT)
            _caught_up(stack)

    with _changes(stack):
        return await interleaved(through_agent, through_hand, pairs)


@contextlib.contextmanager
def _changes(stack: Stack) -> Iterator[None]:
    """A peer more, a peer less, ten times a second, through the API."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        connection_id = ""
        due = time.monotonic()
        try:
            while not stop.is_set():
                if connection_id:
                    stack.disconnect(connection_id, wait=False)
                    connection_id = ""
                else:
                    connection_id = stack.connect(str(PrivateKey.generate().public()), wait=False)
                due = max(due + 1 / _CHANGES_PER_SECOND, time.monotonic() - 1)
                stop.wait(max(0.0, due - time.monotonic()))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="changes")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def _caught_up(stack: Stack) -> None:
    """Until the agent has applied all that was asked for while it was stopped."""
    stack.disconnect(stack.connect(str(PrivateKey.generate().public())))


def _interruption(stack: Stack, client: Client) -> list[Result]:
    """End, kill and reset the agent while packets pass; the tunnel must not notice."""
    title = "new handshakes over restart, kill -9 and re-sync"
    client.host.run("wg", "set", "wg0", "peer", _only_peer(client), "remove")
    client.connect()
    client.ping()
    before = _handshake(stack, client)
    started = time.monotonic()
    pinging = client.host.namespace.popen(
        "ping", "-n", "-q", "-i", "0.01", _NODE_ADDRESS, stdout=subprocess.PIPE, text=True
    )
    stack.stop_agent()
    _back(stack)
    stack.stop_agent(signal.SIGKILL)
    _back(stack)
    stack.stop_agent()
    for file in stack.agent_directory.glob("state*"):
        file.unlink()
    _back(stack)
    pinging.send_signal(signal.SIGINT)
    told, _ = pinging.communicate(timeout=30)
    took = time.monotonic() - started
    after = _handshake(stack, client)
    if took > _REKEY_SECONDS:
        return [not_measured(ROW, title, f"it took {took:.0f} s, and WireGuard makes one by itself after 120 s")]
    counted = _LOSS.search(told)
    assert counted is not None, told
    sent, received = int(counted[1]), int(counted[2])
    return [
        absolute(ROW, title, "", float(after != before), goal=Goal(at_most=0)),
        absolute(
            ROW, f"packets lost meanwhile, of {sent:,} at 100/s", "", float(sent - received), goal=Goal(at_most=0)
        ),
    ]


def _back(stack: Stack) -> None:
    stack.start_agent()
    wait_until(stack.agent_connected, 60)
    _caught_up(stack)


def _handshake(stack: Stack, client: Client) -> int:
    lines = stack.node.run("wg", "show", INTERFACE, "latest-handshakes").splitlines()
    (line,) = [line for line in lines if line.startswith(client.public_key)]
    return int(line.split()[1])


def _only_peer(client: Client) -> str:
    return client.host.run("wg", "show", "wg0", "peers").strip()


def _client_of_agent(exits: ExitStack, stack: Stack) -> Client:
    key = PrivateKey.generate()
    connection_id = stack.connect(str(key.public()))
    config = stack.call("GET", f"/api/connections/{connection_id}/config?format=json")
    return _client(exits, stack.directory, stack.node, "cl-a", key, config)


def _client_by_hand(exits: ExitStack, stack: Stack, peers: int, addresses: list[str]) -> Client:
    """The same interface, by hand: the same peers, and the client as one more.

    Its addresses are those of the agent's client: an address far from all others is found sooner.
    """
    hand = exits.enter_context(Host("hand"))
    server, key = PrivateKey.generate(), PrivateKey.generate()
    secret = encode_key(bytes(range(32)))
    file = material.wg_file(stack.directory / "hand.conf", server, _PORT, material.peers(peers))
    with file.open("a") as more:
        more.write(f"[Peer]\nPublicKey = {key.public()}\nPresharedKey = {secret}\n")
        more.write(f"AllowedIPs = {', '.join(addresses)}\n")
    # In a session of its own, as the agent starts it and any service is: with automatic groups the scheduler gives a
    # session its share of the processors, and one that shares it with the load passes some 7 % more.
    hand.run("setsid", "wireguard-go", INTERFACE)
    hand.run("wg", "setconf", INTERFACE, str(file))
    hand.run("ip", "address", "add", f"{_NODE_ADDRESS}/16", "dev", INTERFACE)
    hand.run("ip", "link", "set", INTERFACE, "mtu", "1420", "up")
    hand.run("nft", "-f", "-", stdin=_NAT)
    config = {"addresses": addresses, "server_public_key": str(server.public()), "preshared_key": secret}
    return _client(exits, stack.directory, hand, "cl-h", key, config)


def _client(
    exits: ExitStack, directory: Path, server: Host, name: str, key: PrivateKey, config: dict[str, Any]
) -> Client:
    """A host with one tunnel to the server, and an iperf3 there that waits for it."""
    host = exits.enter_context(Host(name))
    server.namespace.connect(host.namespace, f"{_OUTSIDE}/24", f"{_CLIENT}/24")
    file = directory / f"{name}.conf"
    file.touch(mode=0o600)
    file.write_text(
        f"[Interface]\nPrivateKey = {key.reveal()}\n[Peer]\nPublicKey = {config['server_public_key']}\n"
        f"PresharedKey = {config['preshared_key']}\nAllowedIPs = 10.66.0.0/16\nEndpoint = {_OUTSIDE}:{_PORT}\n"
    )
    client = Client(host, file, str(key.public()), config["addresses"])
    host.run("wireguard-go", "wg0")
    client.connect()
    (address,) = [address for address in config["addresses"] if ":" not in address]
    host.run("ip", "address", "add", address, "dev", "wg0")
    host.run("ip", "link", "set", "wg0", "mtu", "1420", "up")
    host.run("ip", "route", "add", "10.66.0.0/16", "dev", "wg0")
    server.start(directory / f"iperf-{name}.log", "iperf3", "-s", "-B", _NODE_ADDRESS)
    client.ping()
    return client
