"""The keys of OpenVPN's tls-crypt-v2: one of the servers, and clients' that it wraps (doc/tls-crypt-v2.txt of OpenVPN).

A server keeps no client keys: each client shows its own, wrapped, in its first packet.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import textwrap
import time

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

SERVER_KEY = "OpenVPN tls-crypt-v2 server key"
CLIENT_KEY = "OpenVPN tls-crypt-v2 client key"
SERVER_KEY_BYTES = 128  # the halves have a key each in their first 32 bytes: to encrypt, to authenticate
CLIENT_KEY_BYTES = 256
_TIMESTAMP = b"\x01"  # the kind of metadata that is a time
_IV_BYTES = 16


def new_server_key() -> bytes:
    return os.urandom(SERVER_KEY_BYTES)


def server_key_pem(key: bytes) -> str:
    return _pem(SERVER_KEY, key)


def new_client_key_pem(server_key: bytes) -> str:
    """A new client key and its wrapped form, as a client's profile has them."""
    key = os.urandom(CLIENT_KEY_BYTES)
    return _pem(CLIENT_KEY, key + wrap(server_key, key, int(time.time())))


def wrap(server_key: bytes, client_key: bytes, made_at: int) -> bytes:
    """Only servers with this key can open the result; `made_at` (Unix seconds) is what they could revoke it by."""
    encrypting, authenticating = server_key[:32], server_key[64:96]
    content = client_key + _TIMESTAMP + made_at.to_bytes(8)
    length = (hashlib.sha256().digest_size + len(content) + 2).to_bytes(2)
    tag = hmac.digest(authenticating, length + content, "sha256")
    encryptor = Cipher(AES(encrypting), CTR(tag[:_IV_BYTES])).encryptor()
    return tag + encryptor.update(content) + encryptor.finalize() + length


def _pem(label: str, data: bytes) -> str:
    lines = textwrap.wrap(base64.b64encode(data).decode(), 64)
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])
