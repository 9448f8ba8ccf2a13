"""Hashes as crypt(5) has them, made and checked by the C library."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import crypt

# openssl passwd -6 -salt saltstring 'Hello world!'
KNOWN = "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1"


@given(st.text(st.characters(exclude_characters="\0\r\n", codec="utf-8"), max_size=60))
@settings(max_examples=30, deadline=None)
def test_a_password_fits_its_own_hash_and_no_other(password: str) -> None:
    hashed = crypt.hash_password(password, crypt.LEAST_COST)
    assert hashed.startswith("$y$") and hashed.isascii() and hashed.isprintable() and ":" not in hashed
    assert crypt.verify_password(password, hashed)
    assert not crypt.verify_password(password + "x", hashed)


def test_two_hashes_of_a_password_differ() -> None:
    assert crypt.hash_password("correct horse", 1) != crypt.hash_password("correct horse", 1)


def test_a_hash_that_another_program_made_is_known() -> None:
    assert crypt.verify_password("Hello world!", KNOWN)
    assert not crypt.verify_password("hello world!", KNOWN)


@pytest.mark.parametrize("password", ["a\nb", "a\rb", "a\0b", "x" * 256, "\u00e9" * 128])
def test_what_no_login_could_send_is_refused(password: str) -> None:
    with pytest.raises(ValueError, match="at most 255 bytes"):
        crypt.hash_password(password)
    assert not crypt.verify_password(password, KNOWN)


@pytest.mark.parametrize("hashed", ["", "*", "!", "$y$", "$y$j9T$", "plain", "$6$saltstring$", "*0", "$99$x$y"])
def test_a_broken_hash_fits_nothing(hashed: str) -> None:
    assert not crypt.verify_password("correct horse", hashed)
    assert not crypt.verify_password("", hashed)


def test_what_people_choose_is_hashed_slowly() -> None:
    def seconds(cost: int) -> float:
        begin = time.thread_time()
        crypt.hash_password("correct horse", cost)
        return time.thread_time() - begin

    assert min(seconds(0) for _ in range(3)) > 4 * min(seconds(crypt.LEAST_COST) for _ in range(3))


def test_a_cost_that_there_is_not_is_refused() -> None:
    with pytest.raises(crypt.CryptUnavailable):
        crypt.hash_password("correct horse", 12)
