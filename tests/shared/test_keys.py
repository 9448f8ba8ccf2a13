from __future__ import annotations

import base64
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.keys import InvalidKey, PresharedKey, PrivateKey, PublicKey, decode_key, encode_key


@given(st.binary(min_size=32, max_size=32))
def test_a_key_has_one_spelling(raw: bytes) -> None:
    text = encode_key(raw)
    assert decode_key(text) == raw
    # The last character before the padding carries two unused bits: another one with the same bytes is refused.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twin = text[:42] + alphabet[alphabet.index(text[42]) ^ 1] + "="
    with pytest.raises(InvalidKey):
        decode_key(twin)


@pytest.mark.parametrize(
    "text",
    ["", "abc", "=" * 44, encode_key(b"x" * 31), encode_key(b"x" * 33), encode_key(b"x" * 32) + "\n", "é" * 44],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidKey):
        decode_key(text)


@given(st.binary(min_size=32, max_size=32))
def test_private_keys_are_clamped_once_and_for_all(raw: bytes) -> None:
    private = PrivateKey(raw)
    assert private.raw[0] & 7 == 0
    assert private.raw[31] & 0xC0 == 0x40
    assert PrivateKey.parse(private.reveal()) == private


def test_the_public_key_is_that_of_rfc_7748() -> None:
    bob = PrivateKey(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert bob.public().raw.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"


@pytest.mark.parametrize("key", [PrivateKey(os.urandom(32)), PresharedKey(os.urandom(32))])
def test_secrets_do_not_show_themselves(key: PrivateKey | PresharedKey) -> None:
    for text in (str(key), repr(key), f"{key}", f"{key!r}"):
        assert key.reveal() not in text
        assert base64.b64encode(key.raw).decode() not in text
        assert repr(key.raw) not in text


def test_a_public_key_is_not_zero() -> None:
    with pytest.raises(InvalidKey):
        PublicKey(bytes(32))
