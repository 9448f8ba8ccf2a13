"""Keys and tunnels between two commands."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from agent.client.errors import Failure
from agent.client.profile import LocalTunnel, Profile, load_or_make_key
from agent.errors import AgentError
from shared.keys import PrivateKey


def test_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "s1.key"

    first, second = load_or_make_key(path), load_or_make_key(path)

    assert first == second
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_key_of_wg_genkey_is_read(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    path = tmp_path / "own.key"
    path.write_text(f"{key.reveal()}\n")
    path.chmod(0o600)

    assert load_or_make_key(path) == key


@pytest.mark.parametrize("text", ["", "no key", "A" * 43, "é" * 44])
def test_file_without_a_key_is_kept_and_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.key"
    path.write_text(text)
    path.chmod(0o600)

    with pytest.raises(Failure, match=r"own\.key"):
        load_or_make_key(path)
    assert path.read_text() == text


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.key"
    path.write_text(PrivateKey.generate().reveal())
    path.chmod(0o640)

    with pytest.raises(AgentError, match="chmod 600"):
        load_or_make_key(path)


def test_tunnels_are_listed_until_forgotten(tmp_path: Path) -> None:
    profile = Profile(tmp_path / "config", tmp_path / "state")
    tunnel = LocalTunnel("c1", "s1", "fra1", "skyvpn0", "userspace", "/k", ("10.66.0.2/32",), "192.0.2.1:51820")
    assert profile.tunnels() == []

    profile.save_tunnel(tunnel)
    assert profile.tunnels() == [tunnel]

    profile.forget_tunnel("c1")
    profile.forget_tunnel("c1")
    assert profile.tunnels() == []


@pytest.mark.parametrize("id", ["", "../session", "a/b", ".", "..", "a\n"])
def test_an_id_is_no_path(tmp_path: Path, id: str) -> None:
    profile = Profile(tmp_path, tmp_path)
    with pytest.raises(Failure):
        profile.key_file(id)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    profile = Profile(tmp_path / "config", tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "session.json").write_text("{")
    (tmp_path / "config" / "session.json").chmod(0o600)

    with pytest.raises(Failure, match=r"session\.json is damaged"):
        profile.session()
