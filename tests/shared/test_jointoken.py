from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.jointoken import InvalidJoinToken, JoinToken, decode

TOKEN = JoinToken("192.0.2.1:8443", "01a2", b"s" * 32, b"p" * 32)


@given(st.text(max_size=100), st.text(max_size=36), st.binary(min_size=32, max_size=32))
def test_a_token_is_one_line_that_gives_itself_back(address: str, token_id: str, secret: bytes) -> None:
    token = JoinToken(address, token_id, secret, b"p" * 32)
    text = token.encode()
    assert text.isascii()
    assert len(text.split()) == 1
    assert decode(f"  {text}\n") == token


@given(st.integers(min_value=0), st.sampled_from("ABCxyz059-_"))
def test_one_changed_character_is_noticed(position: int, character: str) -> None:
    text = TOKEN.encode()
    position %= len(text)
    changed = text[:position] + character + text[position + 1 :]
    if changed != text:
        # The last character may carry unused bits; then the token is still the same one.
        try:
            assert decode(changed) == TOKEN
            assert position == len(text) - 1
        except InvalidJoinToken:
            return


@given(st.text(max_size=200))
def test_other_text_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidJoinToken) as refused:
        decode("skyjoin1_" + text)
    assert len(text) < 8 or text not in str(refused.value)


def test_the_secret_does_not_show() -> None:
    assert "ssss" not in repr(TOKEN)
    assert "ssss" not in str(TOKEN)


@pytest.mark.parametrize("length", [1, 20, 60])
def test_a_cut_token_is_refused(length: int) -> None:
    with pytest.raises(InvalidJoinToken):
        decode(TOKEN.encode()[:-length])
