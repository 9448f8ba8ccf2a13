"""Netlink messages and attributes as bytes (netlink(7), genetlink); pure."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from agent.drivers.base import DriverError

NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_REPLACE = 0x100
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

_NLMSGERR_ATTR_MSG = 1
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_HEADER_AND_ERROR = struct.Struct("=IHHIIi")
HEADER_BYTES = _HEADER.size


class MalformedMessage(DriverError):
    """Bytes that are not whole netlink messages or attributes."""


@dataclass(frozen=True, slots=True)
class Message:
    type: int
    flags: int
    sequence: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What an NLMSG_ERROR or NLMSG_DONE says: 0, or an errno and the kernel's words where it has some."""

    errno: int
    words: str = ""

    def __str__(self) -> str:
        return f"{os.strerror(self.errno)} ({self.words})" if self.words else os.strerror(self.errno)


def message(type_: int, flags: int, sequence: int, payload: bytes) -> bytes:
    return _HEADER.pack(HEADER_BYTES + len(payload), type_, flags, sequence, 0) + payload


def messages(data: bytes | memoryview) -> Iterator[Message]:
    """Walk all messages of one datagram."""
    view = memoryview(data)
    offset = 0
    while offset + HEADER_BYTES <= len(view):
        length, type_, flags, sequence, _port = _HEADER.unpack_from(view, offset)
        if length < HEADER_BYTES or offset + length > len(view):
            raise MalformedMessage(f"a message of {length} bytes does not fit")
        yield Message(type_, flags, sequence, view[offset + HEADER_BYTES : offset + length])
        offset += _aligned(length)


def succeeded(datagram: bytes, sequence: int) -> bool:
    """Whether it is the usual answer, one acknowledgement of this request that tells no error; what it is when False
    is to be found by `messages`."""
    if len(datagram) < _HEADER_AND_ERROR.size:
        return False
    _length, type_, _flags, answered, _port, error = _HEADER_AND_ERROR.unpack_from(datagram)
    return bool(type_ == NLMSG_ERROR and answered == sequence and error == 0)


def acknowledgement(message: Message) -> Acknowledgement:
    """Read an NLMSG_ERROR, or the NLMSG_DONE that ends a dump (it may carry the dump's error)."""
    if len(message.payload) < _ERROR.size:
        return Acknowledgement(0)
    errno = -_ERROR.unpack_from(message.payload)[0]
    words = ""
    if errno and message.type == NLMSG_ERROR and message.flags & NLM_F_ACK_TLVS:
        (length,) = struct.unpack_from("=I", message.payload, _ERROR.size)
        skip = HEADER_BYTES if message.flags & NLM_F_CAPPED else _aligned(length)
        for type_, value in attributes(message.payload[_ERROR.size + skip :]):
            if type_ == _NLMSGERR_ATTR_MSG:
                words = bytes(value).rstrip(b"\0").decode(errors="replace")
    return Acknowledgement(errno, words)


def attribute(type_: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, type_) + value + b"\0" * (-length % 4)


def nested(type_: int, *attributes: bytes) -> bytes:
    return attribute(type_ | NLA_F_NESTED, b"".join(attributes))


def text(type_: int, value: str) -> bytes:
    return attribute(type_, value.encode() + b"\0")


def u32(type_: int, value: int) -> bytes:
    return attribute(type_, struct.pack("=I", value))


def attributes(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Walk attributes as (type without flags, value)."""
    view = memoryview(data)
    offset = 0
    while offset + _ATTRIBUTE.size <= len(view):
        length, type_ = _ATTRIBUTE.unpack_from(view, offset)
        if length < _ATTRIBUTE.size or offset + length > len(view):
            raise MalformedMessage(f"an attribute of {length} bytes does not fit")
        yield type_ & NLA_TYPE_MASK, view[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)


def read_text(value: memoryview) -> str:
    return bytes(value).rstrip(b"\0").decode(errors="replace")


def read_u32(value: memoryview) -> int:
    return int.from_bytes(value[:4], "little" if struct.pack("=H", 1)[0] else "big")


def _aligned(length: int) -> int:
    return (length + 3) & ~3
