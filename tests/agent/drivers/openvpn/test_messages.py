"""The management protocol: any split of the bytes, notifications in between, and bytes that are none of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.drivers.openvpn.messages import (
    MAX_LINE_BYTES,
    MAX_VARIABLES,
    AnswerLine,
    ClientEvent,
    MalformedMessage,
    Message,
    Notice,
    Reader,
    Row,
    offloaded,
    remote,
    table,
)

STREAM = (
    b">INFO:OpenVPN Management Interface Version 5 -- type 'help' for more info\r\n"
    b"SUCCESS: pid=17\r\n"
    b">CLIENT:CONNECT,3,1\r\n"
    b">CLIENT:ENV,username=alice\r\n"
    b">CLIENT:ENV,password=a=b,c\xff\r\n"
    b">CLIENT:ENV,empty=\r\n"
    b">CLIENT:ENV,END\r\n"
    b">CLIENT:ADDRESS,3,10.70.0.2,1\r\n"
    b">STATE:1700000000,CONNECTED,SUCCESS,10.70.0.1,,,,\r\n"
    b"END\r\n"
)
MESSAGES: list[Message] = [
    Notice("INFO", "OpenVPN Management Interface Version 5 -- type 'help' for more info"),
    AnswerLine("SUCCESS: pid=17"),
    ClientEvent("CONNECT", 3, 1, {"username": "alice", "password": "a=b,c\udcff", "empty": ""}),
    Notice("CLIENT", "ADDRESS,3,10.70.0.2,1"),
    Notice("STATE", "1700000000,CONNECTED,SUCCESS,10.70.0.1,,,,"),
    AnswerLine("END"),
]


def messages(parts: Iterable[bytes]) -> list[Message]:
    reader = Reader()
    return [message for part in parts for message in reader.feed(part)]


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_the_split_into_packets_means_nothing(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert messages(STREAM[a:b] for a, b in itertools.pairwise(places)) == MESSAGES


@settings(deadline=None)
@given(data=st.lists(st.binary(max_size=200) | st.sampled_from([STREAM, b">CLIENT:ENV,", b">CLIENT:CONNECT,1", b"\n"])))
def test_anything_else_is_read_or_refused(data: list[bytes]) -> None:
    try:
        found = messages(data)
    except MalformedMessage:
        return
    assert all(isinstance(message, ClientEvent | Notice | AnswerLine) for message in found)


@pytest.mark.parametrize(
    "line",
    [
        b">CLIENT:CONNECT\n",
        b">CLIENT:CONNECT,x,1\n",
        b">CLIENT:CONNECT,-1,1\n",
        b">CLIENT:DISCONNECT,\n",
        b">CLIENT:REAUTH,1,\xd9\xa3\n",  # an Arabic digit
        b">CLIENT:ENV,a=b\n",
    ],
)
def test_a_client_without_a_number_is_refused(line: bytes) -> None:
    with pytest.raises(MalformedMessage):
        messages([line])


def test_what_does_not_end_is_refused_before_it_fills_the_memory() -> None:
    reader = Reader()
    with pytest.raises(MalformedMessage):
        for _ in range(MAX_LINE_BYTES // 1000 + 2):
            list(reader.feed(b"x" * 1000))
    with pytest.raises(MalformedMessage):
        messages([b">CLIENT:CONNECT,1,1\n", *(b">CLIENT:ENV,v%d=1\n" % n for n in range(MAX_VARIABLES + 1))])


def test_a_password_is_not_in_the_text_of_an_event() -> None:
    (event,) = (message for message in messages([STREAM]) if isinstance(message, ClientEvent))
    assert "a=b" not in repr(event)


HEADER = (
    "HEADER\tCLIENT_LIST\tCommon Name\tReal Address\tVirtual Address\tVirtual IPv6 Address\t"
    "Bytes Received\tBytes Sent\tConnected Since\tConnected Since (time_t)\t"
    "Username\tClient ID\tPeer ID\tData Channel Cipher"
)
ALICE = (
    "CLIENT_LIST\talice\t::ffff:192.0.2.2:50000\t10.70.0.2\tfd70::1000\t12\t34\t2026-01-01 00:00\t17\tUNDEF\t0\t0\tA"
)
BOB = "CLIENT_LIST\tUNDEF\t2001:db8::2\t10.70.0.3\t\t5\t6\t2026-01-01 00:00\t18\tbob\t1\t1\tA"
ASKING = "CLIENT_LIST\tUNDEF\t192.0.2.9:1\t\t\t5\t6\t2026-01-01 00:00\t19\tUNDEF\t2\t2\tA"


def test_the_table_of_clients() -> None:
    lines = [
        "TITLE\tOpenVPN",
        HEADER,
        ALICE,
        BOB,
        ASKING,
        "HEADER\tROUTING_TABLE\tx",
        "ROUTING_TABLE\tx",
        "GLOBAL_STATS\t0",
    ]
    assert table(lines) == [
        Row(0, "alice", "192.0.2.2:50000", "10.70.0.2", "fd70::1000", 17, 12, 34),
        Row(1, "bob", "[2001:db8::2]:0", "10.70.0.3", "", 18, 5, 6),
        Row(2, "", "192.0.2.9:1", "", "", 19, 5, 6),
    ]


def test_the_table_tells_whether_the_kernel_passes_the_data() -> None:
    assert offloaded([HEADER, ALICE, "GLOBAL_STATS\tdco_enabled\t1"])
    assert not offloaded([HEADER, ALICE, "GLOBAL_STATS\tdco_enabled\t0"])
    assert not offloaded([HEADER, ALICE.replace("alice", "dco_enabled")])


def test_columns_are_found_by_their_names() -> None:
    columns = HEADER.split("\t")[2:]
    cells = ALICE.split("\t")[1:]
    turned = ["\t".join(["HEADER", "CLIENT_LIST", *reversed(columns)]), "\t".join(["CLIENT_LIST", *reversed(cells)])]
    assert table(turned) == table([HEADER, ALICE])


@pytest.mark.parametrize(
    "lines", [[ALICE], [HEADER, "CLIENT_LIST\talice"], [HEADER, ALICE.replace("\t12\t", "\t-1\t")]]
)
def test_a_broken_table_is_refused(lines: list[str]) -> None:
    with pytest.raises(MalformedMessage):
        table(lines)


@settings(deadline=None)
@given(lines=st.lists(st.text(max_size=80) | st.sampled_from([HEADER, ALICE, "HEADER", "CLIENT_LIST"]), max_size=8))
def test_any_table_is_read_or_refused(lines: list[str]) -> None:
    try:
        assert all(row.rx >= 0 for row in table(lines))
    except MalformedMessage:
        return


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("192.0.2.2", "192.0.2.2:1"),
        ("::ffff:192.0.2.2", "192.0.2.2:1"),
        ("2001:db8::2", "[2001:db8::2]:1"),
        ("", ":1"),
    ],
)
def test_remote_addresses(host: str, text: str) -> None:
    assert remote(host, "1") == text
