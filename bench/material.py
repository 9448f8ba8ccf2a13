"""What the rows are fed with: peers, the wg files of the same peers, runs of `wg` without a needless process; bounded."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from shared.desired import Peer
from shared.keys import PrivateKey, encode_key

_IPV4, _IPV6 = IPv4Address("10.66.0.0"), IPv6Address("fd66:6b79::")
_FIRST = 16  # the lowest addresses of the pool are the node's own


def peers(count: int, first: int = 0) -> list[Peer]:
    """Peers with one IPv4 and one IPv6 address each; the same number always gives the same peer."""
    return [
        Peer(
            public_key=random.Random(number).randbytes(32),
            allowed_ips=(f"{_IPV4 + _FIRST + number}/32", f"{_IPV6 + _FIRST + number}/128"),
        )
        for number in range(first, first + count)
    ]


def wg_file(path: Path, key: PrivateKey, port: int, fleet: Sequence[Peer], *, endpoints: bool = False) -> Path:
    """The file for `wg setconf` and `wg syncconf` of exactly these peers."""
    lines = [f"[Interface]\nPrivateKey = {key.reveal()}\nListenPort = {port}\n"]
    for number, peer in enumerate(fleet):
        lines.append(f"[Peer]\nPublicKey = {peer.key}\nAllowedIPs = {', '.join(peer.allowed_ips)}\n")
        if endpoints:
            lines.append(f"Endpoint = {IPv4Address('198.18.0.0') + number}:51820\n")
    path.touch(mode=0o600)
    path.write_text("".join(lines))
    return path


def wg_set(name: str, peer: Peer) -> list[str]:
    return ["wg", "set", name, "peer", encode_key(peer.public_key), "allowed-ips", ",".join(peer.allowed_ips)]


def timed(argv: Sequence[str]) -> float:
    """Seconds of a run of the program; posix_spawn, so that the size of this process costs the other side nothing."""
    discard = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    started = time.perf_counter()
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=discard)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{' '.join(argv[:3])} failed: {os.waitstatus_to_exitcode(status)}")
    return seconds
