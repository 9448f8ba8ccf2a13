"""What the rows are fed with: peers, the files for wg(8) of the same peers, timed runs of a program."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from shared.desired import Peer
from shared.keys import PrivateKey, encode_key

FIRST_SLOT = 14  # in the default pool, where slot 0 is 10.66.0.2
_IPV4, _IPV6 = IPv4Address("10.66.0.2") + FIRST_SLOT, IPv6Address("fd66:6b79::2") + FIRST_SLOT


def peers(count: int, first: int = 0) -> list[Peer]:
    """Peers as the controller makes them, with both kinds of address and a preshared key; repeatable."""
    return [_peer(number) for number in range(first, first + count)]


def _peer(number: int) -> Peer:
    chance = random.Random(number)
    return Peer(
        public_key=chance.randbytes(32),
        allowed_ips=(f"{_IPV4 + number}/32", f"{_IPV6 + number}/128"),
        preshared_key=chance.randbytes(32),
    )


def wg_file(path: Path, key: PrivateKey, port: int, fleet: Sequence[Peer], *, endpoints: bool = False) -> Path:
    """The file for `wg setconf` and `wg syncconf` of exactly these peers."""
    lines = [f"[Interface]\nPrivateKey = {key.reveal()}\nListenPort = {port}\n"]
    for number, peer in enumerate(fleet):
        lines.append(f"[Peer]\nPublicKey = {peer.key}\nPresharedKey = {_preshared(peer)}\n")
        lines.append(f"AllowedIPs = {', '.join(peer.allowed_ips)}\n")
        if endpoints:
            lines.append(f"Endpoint = {IPv4Address('198.18.0.0') + number}:51820\n")
    path.touch(mode=0o600)
    path.write_text("".join(lines))
    return path


def wg_set(name: str, peer: Peer, secret: Path) -> list[str]:
    """The command for one peer; wg takes the preshared key from a file, which is written here."""
    secret.touch(mode=0o600)
    secret.write_text(_preshared(peer))
    allowed_ips = ("allowed-ips", ",".join(peer.allowed_ips))
    return ["wg", "set", name, "peer", peer.key, "preshared-key", str(secret), *allowed_ips]


def _preshared(peer: Peer) -> str:
    return encode_key(peer.preshared_key or bytes(32))


def timed(argv: Sequence[str]) -> float:
    """Seconds of a run of the program; posix_spawn, so that the size of this process costs the other side nothing."""
    discard = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    started = time.perf_counter()
    pid = os.posix_spawnp(argv[0], tuple(argv), os.environ, file_actions=discard)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{' '.join(argv[:3])} failed: {os.waitstatus_to_exitcode(status)}")
    return seconds
