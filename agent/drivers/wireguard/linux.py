"""The numbers and fixed bytes of the kernel's WireGuard interface (linux/wireguard.h, genetlink)."""

from __future__ import annotations

import struct

from shared.keys import KEY_BYTES

FAMILY = "wireguard"
GENL_CTRL = 0x10
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 1, 2

GENL = struct.Struct("=BBxx")
VERSION = 1
CMD_GET_DEVICE, CMD_SET_DEVICE = 0, 1

DEVICE_IFNAME = 2
DEVICE_PRIVATE_KEY = 3
DEVICE_PUBLIC_KEY = 4
DEVICE_LISTEN_PORT = 6
DEVICE_PEERS = 8

PEER_PUBLIC_KEY = 1
PEER_PRESHARED_KEY = 2
PEER_FLAGS = 3
PEER_ENDPOINT = 4
PEER_KEEPALIVE = 5
PEER_LAST_HANDSHAKE = 6
PEER_RX = 7
PEER_TX = 8
PEER_ALLOWED_IPS = 9
PEER_PROTOCOL_VERSION = 10
FLAG_REMOVE_ME = 1
FLAG_REPLACE_ALLOWED_IPS = 2

ALLOWED_IP_FAMILY = 1
ALLOWED_IP_ADDRESS = 2
ALLOWED_IP_MASK = 3

NO_KEY = bytes(KEY_BYTES)
HEADER = struct.Struct("=HH")  # of an attribute: length with this header, type


def header(type_: int, value_bytes: int) -> bytes:
    return HEADER.pack(HEADER.size + value_bytes, type_)
