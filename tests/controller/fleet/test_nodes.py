"""What an administrator may say about a node."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.errors import InvalidInput
from controller.fleet.nodes import COUNTRIES, NodeSpec, is_host, printable

GOOD = NodeSpec(name="us-east-1", country="US", city="New York", endpoint="vpn.example.com")


def test_a_good_node_passes() -> None:
    for endpoint in ("vpn.example.com", "203.0.113.7", "2001:db8::7", None, "node-1", "a.b.", "10.0.0.1"):
        replace(GOOD, endpoint=endpoint).check()
    replace(GOOD, city="Zürich", name="US East 1").check()


HOSTILE = [
    "",
    " ",
    "a\nb",
    "a\r",
    "a\0",
    "a;id",
    "a|b",
    "$(id)",
    "`id`",
    'a"',
    "a'",
    "#",
    "%s",
    "a\u2028b",
    "x" * 65536,
    "\u202egnp",
]


@pytest.mark.parametrize("text", [*HOSTILE, "-a", "a-", "é"])
def test_a_name_is_plain(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        replace(GOOD, name=text).check()
    assert set(refused.value.problems) == {"name"}


@pytest.mark.parametrize("text", ["", " ", "a\nb", "a\r", "a\0", "a\u2028b", "x" * 65, "\u202egnp", " Berlin"])
def test_a_city_is_printable(text: str) -> None:
    with pytest.raises(InvalidInput):
        replace(GOOD, city=text).check()


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE,
        "1.2.3.4:80",
        "[::1]",
        "::",
        "0.0.0.0",
        "224.0.0.1",
        "fe80::1%eth0",
        "a..b",
        "-a.com",
        "a_b.com",
        "1.2.3",
    ],
)
def test_an_endpoint_is_a_host(text: str) -> None:
    with pytest.raises(InvalidInput):
        replace(GOOD, endpoint=text).check()


@pytest.mark.parametrize("text", ["", "us", "USA", "XX", "U\n", "ÄÖ"])
def test_a_country_is_a_known_code(text: str) -> None:
    with pytest.raises(InvalidInput):
        replace(GOOD, country=text).check()
    assert len(COUNTRIES) == 249


@pytest.mark.parametrize("text", [*HOSTILE, "a.b", "wg+0", "sixteen-letters-"])
def test_an_interface_is_a_name_that_a_host_takes(text: str) -> None:
    replace(GOOD, interface="wg0", port=1).check()
    with pytest.raises(InvalidInput):
        replace(GOOD, interface=text).check()


def test_every_problem_is_named() -> None:
    with pytest.raises(InvalidInput) as refused:
        NodeSpec(name="", country="", city="", endpoint="", interface="", port=65536).check()
    assert set(refused.value.problems) == {"name", "country", "city", "endpoint", "interface", "port"}
    with pytest.raises(InvalidInput):
        replace(GOOD, port=0).check()


@given(st.text())
def test_no_text_that_passes_as_a_host_can_break_a_line_or_a_quote(text: str) -> None:
    if is_host(text):
        assert text.isascii()
        assert not set(text) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:-")


@given(st.text())
def test_a_nodes_words_cannot_move_the_cursor(text: str) -> None:
    assert printable(text).isprintable()
    assert len(printable(text)) == len(text)
