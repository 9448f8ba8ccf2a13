"""The text protocol: what we write is what a program reads, and any program's answer is read."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.wireguard import uapi
from shared.desired import Peer
from shared.keys import PrivateKey
from shared.protocol import PeerStats
from tests.agent.drivers.wireguard.strategies import peer_lists, unhurried

counters = st.integers(0, (1 << 63) - 1)
stats_lists = peer_lists.flatmap(
    lambda peers: st.tuples(
        *[
            st.builds(
                PeerStats,
                st.just(peer.public_key),
                counters,
                counters,
                counters,
                st.sampled_from(["", "192.0.2.7:51820", "[2001:db8::7]:1"]),
            )
            for peer in peers
        ]
    ).map(lambda stats: (peers, list(stats)))
)


def lines_of(peer: Peer, stats: PeerStats) -> list[str]:
    """A peer's lines in the order of wireguard-go."""
    secret = peer.preshared_key or bytes(32)
    return [
        f"preshared_key={secret.hex()}",
        "protocol_version=1",
        *([f"endpoint={stats.endpoint}"] if stats.endpoint else []),
        f"last_handshake_time_sec={stats.handshake}",
        "last_handshake_time_nsec=5",
        f"tx_bytes={stats.tx}",
        f"rx_bytes={stats.rx}",
        f"persistent_keepalive_interval={peer.keepalive}",
        *(f"allowed_ip={prefix}" for prefix in peer.allowed_ips),
    ]


def answer_of(blocks: list[tuple[Peer, list[str]]], head: str = "") -> str:
    text = "".join(f"public_key={peer.public_key.hex()}\n" + "\n".join(lines) + "\n" for peer, lines in blocks)
    return f"{head}{text}errno=0\n\n"


@unhurried
@given(stats_lists, st.randoms())
def test_an_answer_is_read_whatever_the_order_of_its_lines(
    both: tuple[list[Peer], list[PeerStats]], shuffle: random.Random
) -> None:
    peers, stats = both
    usual = [(peer, lines_of(peer, entry)) for peer, entry in zip(peers, stats, strict=True)]
    assert uapi.parse_stats(answer_of(usual)) == stats
    assert uapi.parse_peers(answer_of(usual)) == tuple(peers)

    mixed = [(peer, [*lines, "a_future_line=1"]) for peer, lines in usual]
    for _peer, lines in mixed:
        shuffle.shuffle(lines)
    assert uapi.parse_stats(answer_of(mixed)) == stats
    assert [peer.digest() for peer in uapi.parse_peers(answer_of(mixed))] == [peer.digest() for peer in peers]


@unhurried
@given(peer_lists)
def test_a_set_operation_says_everything_about_each_peer(peers: list[Peer]) -> None:
    operation = b"".join(uapi.set_peers(peers)).decode()
    assert operation.startswith("set=1\n")
    assert operation.endswith("\n\n") or not peers
    assert "\n\n" not in operation[:-2]
    assert operation.count("replace_allowed_ips=true\n") == len(peers)
    read = uapi.parse_peers(operation.removeprefix("set=1\n").replace("replace_allowed_ips=true\n", ""))
    assert read == tuple(peers)


@pytest.mark.parametrize("count", [0, 1, 249, 250, 251, 1000])
def test_a_large_operation_is_one_in_pieces_that_can_be_made_again(count: int) -> None:
    keys = [number.to_bytes(32) for number in range(count)]
    operation = uapi.remove_peers(keys)
    pieces = list(operation)
    assert len(pieces) == max(-(-count // 250), 1)
    lines = "".join(f"public_key={key.hex()}\nremove=true\n" for key in keys)
    assert b"".join(pieces).decode() == f"set=1\n{lines}\n"
    assert list(operation) == pieces


@unhurried
@given(st.binary(min_size=32, max_size=32), st.integers(0, 65535))
def test_the_interfaces_part_is_read(raw: bytes, port: int) -> None:
    key = PrivateKey(raw)
    settings = uapi.parse_settings(f"private_key={key.raw.hex()}\nlisten_port={port}\nfwmark=1\nerrno=0\n\n")
    assert (settings.private_key, settings.listen_port) == (key.raw, port)
    assert key.raw.hex() not in repr(settings)
    assert str(key.raw) not in repr(settings)


def test_an_interface_without_a_key_has_none() -> None:
    assert uapi.parse_settings("errno=0\n\n") == uapi.Settings(b"", 0)


def test_an_errno_becomes_words() -> None:
    assert uapi.parse_error("errno=0\n\n") is None
    assert uapi.parse_error("errno=-98\n\n") == "Address already in use"
    assert uapi.parse_error("errno=22\n\n") == "Invalid argument"


@pytest.mark.parametrize("answer", ["", "\n\n", "errno=\n\n", "errno=x\n\n", "hello\n\n"])
def test_something_else_is_not_taken_for_an_answer(answer: str) -> None:
    with pytest.raises(ValueError, match="errno"):
        uapi.parse_error(answer)


@unhurried
@given(st.text(alphabet="public_key=0f\n", max_size=200))
def test_garbage_is_an_error_and_never_a_crash(text: str) -> None:
    for parse in (uapi.parse_stats, uapi.parse):
        try:
            parse(text)
        except ValueError:
            continue
