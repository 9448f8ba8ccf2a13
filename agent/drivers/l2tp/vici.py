"""The messages of strongSwan's control socket (VICI, protocol version 1); pure.

A packet is its length (4 bytes, big endian), a type, for named types a name, and a message: sections, lists and values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum

HEADER = struct.Struct(">I")
MAX_PACKET = 512 * 1024
Message = Mapping[str, object]
"""Values are str, lists of str, or messages."""


class MalformedPacket(ValueError):
    """Bytes that are not a packet or message of VICI."""


class Packet(IntEnum):
    REQUEST = 0
    RESPONSE = 1
    UNKNOWN_REQUEST = 2


class _Element(IntEnum):
    SECTION_START = 1
    SECTION_END = 2
    KEY_VALUE = 3
    LIST_START = 4
    LIST_ITEM = 5
    LIST_END = 6


def request(command: str, message: Message) -> bytes:
    body = bytes([Packet.REQUEST]) + _name(command) + encode(message)
    return HEADER.pack(len(body)) + body


def response(packet: bytes) -> dict[str, object]:
    """Read the answer to a request."""
    if packet[:1] == bytes([Packet.UNKNOWN_REQUEST]):
        raise MalformedPacket("the command is unknown there")
    if packet[:1] != bytes([Packet.RESPONSE]):
        raise MalformedPacket(f"a packet of type {packet[0] if packet else 'none'} is not an answer")
    return decode(packet[1:])


def encode(message: Message) -> bytes:
    parts: list[bytes] = []
    for key, value in message.items():
        match value:
            case str():
                parts.append(bytes([_Element.KEY_VALUE]) + _name(key) + _value(value))
            case Mapping():
                parts += [bytes([_Element.SECTION_START]) + _name(key), encode(value), bytes([_Element.SECTION_END])]
            case list() | tuple():
                items = [bytes([_Element.LIST_ITEM]) + _value(item) for item in value]
                parts += [bytes([_Element.LIST_START]) + _name(key), *items, bytes([_Element.LIST_END])]
            case _:
                raise TypeError(f"{key} is neither text, list nor section")
    return b"".join(parts)


def decode(data: bytes) -> dict[str, object]:
    return _Reader(data).message()


def _name(name: str) -> bytes:
    raw = name.encode()
    return bytes([len(raw)]) + raw


def _value(value: str) -> bytes:
    raw = value.encode()
    return struct.pack(">H", len(raw)) + raw


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def message(self) -> dict[str, object]:
        root: dict[str, object] = {}
        open_sections = [root]
        while self._at < len(self._data):
            match self._byte():
                case _Element.SECTION_START:
                    section: dict[str, object] = {}
                    open_sections[-1][self._name()] = section
                    open_sections.append(section)
                case _Element.SECTION_END if len(open_sections) > 1:
                    open_sections.pop()
                case _Element.KEY_VALUE:
                    key = self._name()
                    open_sections[-1][key] = self._value()
                case _Element.LIST_START:
                    key = self._name()
                    open_sections[-1][key] = self._list()
                case other:
                    raise MalformedPacket(f"an element of type {other} does not belong here")
        if len(open_sections) > 1:
            raise MalformedPacket("a section has no end")
        return root

    def _list(self) -> list[str]:
        items: list[str] = []
        while (kind := self._byte()) == _Element.LIST_ITEM:
            items.append(self._value())
        if kind != _Element.LIST_END:
            raise MalformedPacket(f"an element of type {kind} does not belong into a list")
        return items

    def _name(self) -> str:
        return self._take(self._byte()).decode(errors="replace")

    def _value(self) -> str:
        return self._take(int.from_bytes(self._take(2))).decode(errors="replace")

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise MalformedPacket("the message ends too early")
        self._at += count
        return taken
