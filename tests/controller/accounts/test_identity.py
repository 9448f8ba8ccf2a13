"""User names, e-mail addresses and passwords that may and may not be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.accounts.identity import check_password, check_username, fold, parse_email


@pytest.mark.parametrize("name", ["alice", "_x", "a", "a-b_c9", "a" * 31])
def test_safe_user_names_are_accepted(name: str) -> None:
    assert check_username(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "root",
        "sshd",
        "postgres",
        "systemd-x",
        "-oX",
        "a;id",
        "a/../x",
        "é",
        "Alice",
        "9a",
        "a" * 32,
        "a\n",
        "a\0",
        "a b",
        "a\u2028",
        "a'",
        "ſ",
        "K",
        "a\u202e",
    ],
)
def test_unsafe_user_names_are_refused(name: str) -> None:
    assert check_username(name) is not None


@given(st.text(max_size=40))
def test_an_accepted_user_name_needs_no_quoting_anywhere(name: str) -> None:
    if check_username(name) is None:
        assert re.fullmatch(r"[a-z_][a-z0-9_-]*", name, re.ASCII)
        assert fold(name) == name


@pytest.mark.parametrize(
    "password", ["correct horse", "пароль-длинный", "👨‍👩‍👧‍👦 family", "x y" * 300, "\"'`$();\\%#"]
)
def test_passwords_of_any_printable_characters_are_accepted(password: str) -> None:
    assert check_password(password) is None


@pytest.mark.parametrize(
    "password",
    [
        "",
        "short7!",
        "password1",
        "PassWord1",
        "aaaaaaaaaa",
        "x" * 500 + "é" * 300,
        "line\nbreak1",
        "nul\0nul\0nul",
        "separator\u2028x",
        "alice-smith",
        "surrogate\ud800",
    ],
)
def test_passwords_that_are_guessed_or_cannot_be_typed_are_refused(password: str) -> None:
    assert check_password(password, "Alice-Smith") is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "a@b",
        "a@localhost",
        "a b@example.com",
        "a@example.com\n",
        "a\0@example.com",
        "@example.com",
        "a@exa mple.com",
        "x" * 65 + "@example.com",
        "a@" + "b" * 300 + ".com",
        "a@example.com;b@example.com",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an e-mail address"):
        parse_email(text)


def test_the_domain_of_an_address_is_folded_and_its_local_part_kept() -> None:
    assert parse_email("Al.Ice+vpn@EXAMPLE.com") == "Al.Ice+vpn@example.com"
