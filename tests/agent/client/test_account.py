"""login and logout: what is kept, what is refused, what the person is told."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from aiohttp import web

from agent.client.account import check_url
from agent.client.errors import Misuse

from .conftest import PASSWORD, TOKEN, Cli, FakeController, error


async def test_login_keeps_the_session_for_the_owner_only(cli: Cli, controller: FakeController, home: Path) -> None:
    outcome = await cli("login", "--url", controller.url, "--password-stdin", "alice", stdin=f"{PASSWORD}\n")

    assert outcome.status == 0
    session = home / "config" / "skynetvpn" / "session.json"
    assert stat.S_IMODE(session.stat().st_mode) == 0o600
    assert stat.S_IMODE(session.parent.stat().st_mode) == 0o700
    assert TOKEN in session.read_text()
    assert TOKEN not in outcome.out + outcome.err
    assert PASSWORD not in session.read_text() + outcome.out + outcome.err


async def test_wrong_password_is_told_as_such_and_keeps_nothing(
    cli: Cli, controller: FakeController, home: Path
) -> None:
    outcome = await cli("login", "--url", controller.url, "--password-stdin", "alice", stdin="wrong\n")

    assert outcome.status == 1
    assert "wrong user name or password" in outcome.err
    assert not (home / "config").exists()


async def test_url_of_the_environment_is_used_and_remembered(
    cli: Cli, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYNETVPN_URL", controller.url)
    assert (await cli("login", "alice", "--password-stdin", stdin=f"{PASSWORD}\n")).status == 0
    monkeypatch.delenv("SKYNETVPN_URL")

    outcome = await cli("-o", "json", "login", "alice", "--password-stdin", stdin=f"{PASSWORD}\n")

    assert outcome.json["url"] == controller.url


@pytest.mark.parametrize(
    ("stdin", "arguments"),
    [("\n", ["alice", "--password-stdin"]), (f"{PASSWORD}\n", ["--password-stdin"]), (f"{PASSWORD}\n", ["alice"])],
    ids=["empty password", "no user", "a password on a stdin that nobody named"],
)
async def test_login_without_what_it_needs_is_wrong_usage(
    cli: Cli, controller: FakeController, stdin: str, arguments: list[str]
) -> None:
    outcome = await cli("login", "--url", controller.url, *arguments, stdin=stdin)

    assert outcome.status == 2
    assert not controller.requests


@pytest.mark.parametrize(
    "url", ["ftp://host", "host:8080", "http://", "https://u:p@host", "https://host?x=1", "http://[x"]
)
def test_what_is_no_address_of_a_controller_is_refused(url: str) -> None:
    with pytest.raises(Misuse):
        check_url(url, allow_http=True)


@pytest.mark.parametrize(
    "url", ["https://vpn.example.org", "http://127.0.0.1:8080", "http://[::1]:8080", "http://localhost"]
)
def test_a_password_may_go_over_https_or_stay_on_the_machine(url: str) -> None:
    check_url(url, allow_http=False)


def test_a_password_leaves_the_machine_in_clear_text_only_when_asked_to() -> None:
    with pytest.raises(Misuse, match="clear text"):
        check_url("http://192.0.2.1", allow_http=False)
    check_url("http://192.0.2.1", allow_http=True)


async def test_logout_ends_the_session_there_and_forgets_it_here(logged_in: Cli, controller: FakeController) -> None:
    assert (await logged_in("logout")).status == 0

    assert controller.seen("POST /auth/logout") == [None]
    assert (await logged_in("servers")).status == 3


async def test_logout_forgets_the_session_also_when_the_controller_does_not_answer(
    logged_in: Cli, controller: FakeController
) -> None:
    controller.answers["POST /auth/logout"] = lambda: web.Response(status=502, text="bad gateway")

    outcome = await logged_in("logout")

    assert outcome.status == 1
    assert "lives on until 2026-12-01" in outcome.err
    assert (await logged_in("servers")).status == 3


async def test_a_session_that_ended_says_to_log_in(logged_in: Cli, controller: FakeController) -> None:
    controller.answers["GET /servers"] = lambda: error(401, "the token is not valid")

    outcome = await logged_in("servers")

    assert outcome.status == 3
    assert "run skynetvpn login" in outcome.err


async def test_a_session_file_that_others_can_read_is_not_used(logged_in: Cli, home: Path) -> None:
    (home / "config" / "skynetvpn" / "session.json").chmod(0o644)

    outcome = await logged_in("servers")

    assert outcome.status == 1
    assert "chmod 600" in outcome.err
