"""Seals secrets for the database: AES-256-GCM, bound to the very field that they are stored in."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from controller.errors import DomainError, ErrorKind

_NONCE_BYTES = 12


class SecretUnreadable(DomainError):
    """A sealed value does not open: its key is not configured, or it was altered or moved."""

    kind = ErrorKind.UNAVAILABLE
    code = "secret_unreadable"
    message = "a stored secret cannot be opened with the configured keys; put back the key {key_id!r}"


class SecretBox:
    """Seals with the current key and opens with every key it holds, so that keys can be rotated.

    A sealed value is: length of the key id (1 byte), key id, nonce, ciphertext with tag. The place (table, column,
    row id) is authenticated, so that a value copied into another row or column does not open there.
    """

    def __init__(self, keys: Mapping[str, bytes], current: str) -> None:
        if current not in keys:
            raise ValueError(f"the current key {current!r} is not among the keys")
        for key_id, key in keys.items():
            if len(key) != 32:
                raise ValueError(f"key {key_id!r} is not 32 bytes")
            if not 1 <= len(key_id.encode()) <= 255:
                raise ValueError("a key id is 1 to 255 bytes")
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._current = current

    def seal(self, value: bytes, *, table: str, column: str, row: str) -> bytes:
        key_id = self._current.encode()
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[self._current].encrypt(nonce, value, _place(table, column, row))
        return bytes([len(key_id)]) + key_id + nonce + sealed

    def open(self, sealed: bytes, *, table: str, column: str, row: str) -> bytes:
        """Raise SecretUnreadable where the value was not sealed for this place with one of the keys."""
        start = 1 + sealed[0] if sealed else 0
        key_id = sealed[1:start].decode(errors="replace")
        nonce, ciphertext = sealed[start : start + _NONCE_BYTES], sealed[start + _NONCE_BYTES :]
        cipher = self._ciphers.get(key_id)
        if cipher is None or len(nonce) != _NONCE_BYTES:
            raise SecretUnreadable(key_id=_shown(key_id))
        try:
            return cipher.decrypt(nonce, ciphertext, _place(table, column, row))
        except InvalidTag as error:
            raise SecretUnreadable(key_id=key_id) from error


def _shown(key_id: str) -> str:
    """What was never sealed has no key id, and may be a secret itself."""
    return key_id if key_id.isascii() and key_id.isprintable() else "?"


def _place(table: str, column: str, row: str) -> bytes:
    return f"{table}|{column}|{row}".encode()
