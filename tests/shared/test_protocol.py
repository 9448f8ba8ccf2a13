from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import protocol
from shared.protocol import Delta, Hello, Load, MalformedFrame, PeerStats, Report, Resource, ResourceName, Snapshot


@pytest.mark.parametrize(
    "frame",
    [
        Hello(
            version=1, agent="0.1.0", boot_id="b", epoch="e", revisions={"node:1": 7}, wireguard_public_key=b"k" * 32
        ),
        Report(
            sequence=1,
            boot_id="b",
            generation="g",
            peers=[PeerStats(b"k" * 32, 1, 2, 3, "192.0.2.1:1")],
            load=Load(total=5, cpu=5, memory=1, bandwidth=0, peers=0),
        ),
    ],
)
def test_frames_of_the_agent_survive_the_wire(frame: protocol.Frame) -> None:
    assert protocol.decode_from_agent(protocol.encode(frame)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        Delta(
            epoch="e",
            scope="node:1",
            base=1,
            revision=2,
            upserts=[Resource("wireguard.peer", "k", b"x")],
            removals=[ResourceName("wireguard.peer", "l")],
        ),
        Snapshot(epoch="e", scope="node:1", revision=2, part=0, last=True),
    ],
)
def test_frames_of_the_controller_survive_the_wire(frame: protocol.Frame) -> None:
    assert protocol.decode_from_controller(protocol.encode(frame)) == frame


def test_a_newer_version_is_tolerated() -> None:
    assert protocol.decode_from_agent(msgspec.msgpack.encode({"t": "teleport", "x": 1})) is None
    assert protocol.decode_from_controller(msgspec.msgpack.encode({"t": "teleport"})) is None
    known = {"t": "received", "sequence": 4, "new_field": [1]}
    assert protocol.decode_from_controller(msgspec.msgpack.encode(known)) == protocol.Received(sequence=4)


@pytest.mark.parametrize(
    "message",
    [
        {"t": "report", "sequence": -1, "boot_id": "b", "generation": "g"},
        {"t": "report", "sequence": 1, "boot_id": "b", "generation": "g", "peers": [[b"k", -1, 0, 0]]},
        {"t": "report", "sequence": 1, "boot_id": "b", "generation": "g", "peers": [[b"k", 1.5, 0, 0]]},
        {"t": "report", "sequence": 1, "boot_id": "b", "generation": "g", "peers": [[b"k", float("nan"), 0, 0]]},
        {"t": "report", "sequence": 1, "boot_id": "b", "generation": "g", "peers": [[b"k", 2**63, 0, 0]]},
        {"t": "hello", "version": "1", "agent": "a", "boot_id": "b"},
        {"t": "hello", "version": 1, "agent": "a" * 300, "boot_id": "b"},
        {"t": "hello"},
        {"sequence": 1},
        {"t": 7},
        [],
        "hello",
    ],
)
def test_what_does_not_fit_is_malformed(message: object) -> None:
    with pytest.raises(MalformedFrame):
        protocol.decode_from_agent(msgspec.msgpack.encode(message))


@given(st.binary(max_size=300))
def test_garbage_never_raises_anything_else(data: bytes) -> None:
    for decode in (protocol.decode_from_agent, protocol.decode_from_controller):
        with contextlib.suppress(MalformedFrame):
            assert decode(data) is None


def test_an_enrolment_does_not_show_its_secret() -> None:
    request = protocol.EnrolRequest(token_id="t", secret=b"s" * 32, csr=b"c", agent="a", wireguard_public_key=b"k" * 32)
    assert "ssss" not in repr(request)
