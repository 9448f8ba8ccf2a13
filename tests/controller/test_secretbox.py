"""Sealed values open only where they were sealed, and only with their key."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.secretbox import SecretBox, SecretUnreadable

PLACE = {"table": "connections", "column": "sealed_private_key", "row": "r1"}


def box() -> SecretBox:
    return SecretBox({"k1": os.urandom(32)}, "k1")


@given(st.binary())
def test_a_sealed_value_opens_again_and_does_not_show_itself(value: bytes) -> None:
    sealer = box()
    sealed = sealer.seal(value, **PLACE)
    assert sealer.open(sealed, **PLACE) == value
    assert len(value) < 8 or value not in sealed


def test_the_same_value_is_sealed_differently_each_time() -> None:
    sealer = box()
    assert sealer.seal(b"secret", **PLACE) != sealer.seal(b"secret", **PLACE)


@pytest.mark.parametrize("changed", [{"row": "r2"}, {"column": "other"}, {"table": "users"}])
def test_a_value_moved_elsewhere_does_not_open(changed: dict[str, str]) -> None:
    sealer = box()
    sealed = sealer.seal(b"secret", **PLACE)
    with pytest.raises(SecretUnreadable):
        sealer.open(sealed, **(PLACE | changed))


@given(st.data())
def test_an_altered_value_does_not_open(data: st.DataObject) -> None:
    sealer = box()
    sealed = bytearray(sealer.seal(b"secret", **PLACE))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SecretUnreadable):
        sealer.open(bytes(sealed), **PLACE)


@given(st.binary(max_size=64))
def test_rubbish_does_not_open(sealed: bytes) -> None:
    with pytest.raises(SecretUnreadable):
        box().open(sealed, **PLACE)


def test_a_former_key_still_opens_and_a_missing_one_is_named() -> None:
    old, new = os.urandom(32), os.urandom(32)
    sealed = SecretBox({"old": old}, "old").seal(b"secret", **PLACE)
    assert SecretBox({"new": new, "old": old}, "new").open(sealed, **PLACE) == b"secret"
    with pytest.raises(SecretUnreadable, match="'old'"):
        SecretBox({"new": new}, "new").open(sealed, **PLACE)


def test_what_was_never_sealed_is_not_told_by_the_refusal() -> None:
    with pytest.raises(SecretUnreadable) as refused:
        box().open(bytes([40]) + b"\x83\xa3preshared_key\xc4\x20" + bytes(range(100, 132)), **PLACE)
    assert "preshared" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "current"), [({"k1": b"short"}, "k1"), ({"k1": bytes(32)}, "k2"), ({"": bytes(32)}, "")]
)
def test_unusable_keys_are_refused(keys: dict[str, bytes], current: str) -> None:
    with pytest.raises(ValueError):
        SecretBox(keys, current)
