"""Our lines of passwd and shadow, among others' lines."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.drivers.ssh.passwd import GID, UIDS, Login, parse, passwd_line, replace, shadow_line
from shared.access import MAX_TUNNEL, USERNAME, Credential
from shared.resource import InvalidResource, Protocol

PASSWD = "root:x:0:0:root:/root:/bin/bash\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
SHADOW = "root:*:20000:0:99999:7:::\nsshd:!:20000::::::\n"

LOGINS = st.builds(
    Login,
    name=st.from_regex(USERNAME, fullmatch=True),
    uid=st.sampled_from(UIDS),
    secret=st.from_regex(r"\$[a-z0-9]{1,8}\$[./A-Za-z0-9$=,]{1,100}", fullmatch=True) | st.just(""),
    changed=st.integers(0, 40_000),
    last_day=st.none() | st.integers(0, 40_000),
    tunnel=st.integers(0, MAX_TUNNEL),
)


@given(st.lists(LOGINS, unique_by=lambda login: login.name))
def test_logins_come_back_as_they_went(logins: list[Login]) -> None:
    wanted = {login.name: login for login in logins if login.name not in ("root", "sshd")}
    passwd = replace(PASSWD, {name: passwd_line(login) for name, login in wanted.items()})
    shadow = replace(SHADOW, {name: shadow_line(login) for name, login in wanted.items()})

    found = parse(passwd, shadow)

    assert dict(found.ours) == wanted
    assert found.foreign == {"root", "sshd"}
    assert passwd.startswith(PASSWD)
    assert shadow.startswith(SHADOW)
    assert replace(passwd, dict.fromkeys(wanted)) == PASSWD
    assert replace(shadow, dict.fromkeys(wanted)) == SHADOW


@given(st.lists(LOGINS, unique_by=lambda login: login.name, min_size=1), st.data())
def test_a_change_leaves_all_other_lines_alone(logins: list[Login], data: st.DataObject) -> None:
    text = replace(PASSWD, {login.name: passwd_line(login) for login in logins})
    changed = data.draw(st.sampled_from(logins))
    moved = Login(changed.name, data.draw(st.sampled_from(UIDS)), "")

    lines = replace(text, {changed.name: passwd_line(moved)}).split("\n")

    assert [line for line in lines if not line.startswith(f"{changed.name}:")] == [
        line for line in text.split("\n") if not line.startswith(f"{changed.name}:")
    ]
    assert lines.count(passwd_line(moved)) == 1


@given(st.text(max_size=60), st.text(max_size=60))
@example("alice\nmallory", "$y$x")
@example("alice", "$y$x\nroot:$y$x:1::::::")
@example("alice", "$y$x:1")
@example("Alice", "$y$x")
@example("a;id", "$y$x")
@example("a/../x", "$y$x")
@example("-oX", "$y$x")
@example("é", "$y$x")
def test_what_could_break_a_line_is_refused_before(name: str, secret: str) -> None:
    try:
        Credential(protocol=Protocol.SSH, username=name, account=1, secret=secret).check()
    except InvalidResource:
        return
    login = Login(name, UIDS[5], secret, 1)
    found = parse(passwd_line(login), shadow_line(login))
    assert dict(found.ours) == {name: login}


@pytest.mark.parametrize(
    "line",
    [
        f"alice:x:{UIDS[0]}:{GID}:Alice:/nonexistent:/usr/sbin/nologin",
        f"alice:x:{UIDS[0]}:100:SkynetVPN tunnel login:/nonexistent:/usr/sbin/nologin",
        f"alice:x:1000:{GID}:SkynetVPN tunnel login:/nonexistent:/usr/sbin/nologin",
        f"alice:x:{UIDS[0]}:{GID}:SkynetVPN tunnel login:/nonexistent",
        "alice",
        "+::::::",
    ],
    ids=["mark", "group", "uid", "short", "bare", "nis"],
)
def test_an_account_that_only_looks_like_ours_is_foreign(line: str) -> None:
    found = parse(f"{line}\n", "")

    assert not found.ours
    assert found.foreign == {line.partition(":")[0]}


def test_a_login_without_password_is_not_locked() -> None:
    """sshd refuses the keys of an account whose hash begins with `!`."""
    assert shadow_line(Login("alice", UIDS[0], "", 1)).split(":")[1] == "*"


def test_a_hash_that_the_admin_locked_is_told_as_it_is() -> None:
    login = Login("alice", UIDS[0], "$y$x", 1)
    shadow = shadow_line(login).replace(":$y$x:", ":!$y$x:")

    assert parse(passwd_line(login), shadow).ours["alice"].secret == "!$y$x"


def test_a_name_that_is_somebody_elses_as_well_is_foreign() -> None:
    line = passwd_line(Login("root", UIDS[0], "", 1))

    for passwd in (PASSWD + line, f"{line}\n{PASSWD}"):
        found = parse(passwd, SHADOW)
        assert not found.ours
        assert "root" in found.foreign
