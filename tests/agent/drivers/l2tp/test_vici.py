"""The messages of charon's control socket, against the format's own example and against anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.l2tp.vici import HEADER, MalformedPacket, decode, encode, request, response

texts = st.text(max_size=300)
keys = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=30)
messages = st.recursive(
    st.dictionaries(keys, texts | st.lists(texts, max_size=4), max_size=4),
    lambda inner: st.dictionaries(keys, texts | inner, max_size=4),
    max_leaves=8,
)


def test_a_message_is_encoded_as_the_protocol_says() -> None:
    message = {"key1": "value1", "section1": {"sub-section": {"key2": "value2"}, "list1": ["item1", "item2"]}}
    assert encode(message) == (
        b"\x03\x04key1\x00\x06value1"
        b"\x01\x08section1"
        b"\x01\x0bsub-section\x03\x04key2\x00\x06value2\x02"
        b"\x04\x05list1\x05\x00\x05item1\x05\x00\x05item2\x06"
        b"\x02"
    )
    assert request("version", {}) == HEADER.pack(9) + b"\x00\x07version"


@given(messages)
def test_what_is_encoded_is_decoded_the_same(message: dict[str, object]) -> None:
    assert decode(encode(message)) == message
    assert response(b"\x01" + encode(message)) == message


@given(st.binary(max_size=200))
def test_anything_else_is_malformed_or_a_message(data: bytes) -> None:
    try:
        assert isinstance(response(data), dict)
    except MalformedPacket:
        assert data[:1] != b"\x01" or data[1:]


@pytest.mark.parametrize("packet", [b"", b"\x02", b"\x07", b"\x01\x01\x01a", b"\x01\x02", b"\x01\x03\x01a\x00\x05abc"])
def test_a_broken_answer_is_told(packet: bytes) -> None:
    with pytest.raises(MalformedPacket):
        response(packet)


def test_only_text_lists_and_sections_can_be_said() -> None:
    with pytest.raises(TypeError):
        encode({"number": 1})
