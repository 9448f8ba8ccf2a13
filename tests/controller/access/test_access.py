"""Logins of accounts: who has them, what nodes are told of them, and when they go."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from controller.access import credentials
from controller.access.errors import PasswordHashUnavailable
from controller.access.service import Access
from controller.access.tables import CredentialRow
from controller.access.usernames import check_login, new_login
from controller.accounts.service import Client, User
from controller.accounts.tables import UserRow
from controller.errors import InvalidInput
from controller.store.database import Transaction
from controller.store.types import now
from shared import crypt
from shared.access import USERNAME, Limits
from tests.controller.access.conftest import PASSWORD

CLIENT = Client("203.0.113.7", "tests/1")


def held(directory: Path, secret: bytes) -> list[str]:
    """The files of the database that the secret can be read from."""
    return [path.name for path in sorted(directory.glob("controller.db*")) if secret in path.read_bytes()]


async def test_an_account_gets_a_login_of_each_protocol_on_all_nodes(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "openvpn", "l2tp", "wireguard")
    wanted = await world.wanted()
    assert set(wanted) == {"ssh/alice", "openvpn/alice", "l2tp/alice"}
    assert {found.account for found in wanted.values()} == {user.number}
    assert crypt.verify_password(PASSWORD, wanted["ssh/alice"].secret)
    assert wanted["openvpn/alice"].secret == wanted["ssh/alice"].secret
    assert wanted["l2tp/alice"].secret == PASSWORD
    assert all(found.limits == Limits() and found.not_after is None for found in wanted.values())


async def test_a_grant_is_exactly_what_is_given_and_again_changes_nothing(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "l2tp")
    before = await world.wanted()
    await world.grant(user, "l2tp", "ssh", password=None)
    assert await world.wanted() == before
    await world.grant(user, "l2tp", password=None)
    assert set(await world.wanted()) == {"l2tp/alice"}
    await world.grant(user, "wireguard", password=None)
    assert await world.wanted() == {}
    async with world.database.read() as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(CredentialRow)) == 0


async def test_a_hash_that_is_known_serves_the_other_protocol_too(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh")
    await world.grant(user, "openvpn", "ssh", password=None)
    wanted = await world.wanted()
    assert wanted["openvpn/alice"].secret == wanted["ssh/alice"].secret


@pytest.mark.parametrize(("had", "wants"), [((), ("ssh",)), (("ssh",), ("ssh", "l2tp")), (("l2tp",), ("openvpn",))])
async def test_a_password_that_is_needed_is_asked_for(world: Any, had: tuple[str, ...], wants: tuple[str, ...]) -> None:
    user = await world.user()
    await world.grant(user, *had)
    before = await world.wanted()
    with pytest.raises(InvalidInput) as caught:
        await world.grant(user, *wants, password=None)
    assert list(caught.value.problems) == ["password"]
    assert await world.wanted() == before


@pytest.mark.parametrize(
    ("protocol", "password"),
    [
        ("l2tp", "pässword"),
        ("l2tp", "tab\tinside"),
        ("l2tp", "x" * 256),
        ("l2tp", "line\nbreak"),
        ("ssh", "x" * 256),
        ("ssh", "é" * 128),
        ("openvpn", "line\nbreak"),
        ("ssh", "carriage\rreturn"),
        ("openvpn", "nul\0inside"),
        ("ssh", "x" * 5000),
    ],
)
async def test_a_password_that_a_protocol_cannot_take_is_refused_and_changes_nothing(
    world: Any, protocol: str, password: str
) -> None:
    user = await world.user()
    with pytest.raises(InvalidInput) as caught:
        await world.grant(user, "wireguard", protocol, password=password)
    assert list(caught.value.problems) == ["password"]
    assert password not in str(caught.value)
    with pytest.raises(InvalidInput) as early:
        await world.access.prepare(password, [protocol])
    assert early.value.problems == caught.value.problems
    assert await world.wanted() == {}


async def test_what_one_protocol_cannot_take_is_good_for_another(world: Any) -> None:
    user = await world.user()
    password = "pass'w\"ö:rd $(id) ;|&"
    await world.grant(user, "ssh", password=password)
    assert crypt.verify_password(password, (await world.wanted())["ssh/alice"].secret)
    await world.grant(user, "l2tp", password="a\"b\\c #d'e")
    assert (await world.wanted())["l2tp/alice"].secret == "a\"b\\c #d'e"


@pytest.mark.parametrize("protocols", [["pptp"], ["ssh", ""], ["SSH"], ["ssh\n"]])
async def test_an_unknown_protocol_is_refused_and_named(world: Any, protocols: list[str]) -> None:
    user = await world.user()
    with pytest.raises(InvalidInput) as caught:
        await world.grant(user, *protocols)
    assert list(caught.value.problems) == ["protocols"]


@pytest.mark.parametrize("name", ["skynet", "skynet-ops", "sky-abc"])
async def test_a_name_that_hosts_keep_for_themselves_gets_no_login(world: Any, name: str) -> None:
    user = await world.user(name)
    with pytest.raises(InvalidInput) as caught:
        await world.grant(user, "ssh")
    assert list(caught.value.problems) == ["username"]
    await world.grant(user, "wireguard")


@pytest.mark.parametrize(
    "name",
    [
        *("root", "daemon", "sshd", "nobody", "postgres", "www-data", "systemd-x", "skynetvpn", "sky-x"),
        *("Alice", "a;id", "", "-a", "a\n", "a" * 32, "1a", "a b", "é", "a$", "../x"),
    ],
)
def test_names_that_no_node_can_have(name: str) -> None:
    assert check_login(name)


@pytest.mark.parametrize("name", ["alice", "_a", "a-b_c9", "a" * 31, "sky", "skylar"])
def test_names_that_nodes_can_have(name: str) -> None:
    assert check_login(name) is None


def test_a_made_up_name_fits_every_protocol_and_no_account() -> None:
    made = {new_login() for _ in range(200)}
    assert len(made) == 200
    assert all(USERNAME.fullmatch(name) and check_login(name) for name in made)


async def test_a_new_password_of_the_account_is_that_of_its_logins(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "l2tp")
    await world.administration.update_user(user.number, password="another good one")
    wanted = await world.wanted()
    assert crypt.verify_password("another good one", wanted["ssh/alice"].secret)
    assert wanted["l2tp/alice"].secret == "another good one"


async def test_a_new_password_that_a_login_cannot_take_changes_nothing_at_all(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "l2tp")
    before = await world.wanted()
    with pytest.raises(InvalidInput, match=r"password: .*L2TP"):
        await world.administration.update_user(user.number, password="ein schönes neues")
    assert await world.wanted() == before
    await world.accounts.login("alice", PASSWORD, "skynet", CLIENT)


async def test_a_password_need_not_suit_a_protocol_that_is_taken_away_with_it(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "l2tp")
    password = "ein schönes neues"
    secrets = await world.access.prepare(password, ["ssh"])

    async def grant(tx: Transaction, changed: User) -> None:
        await world.access.grant(tx, changed.id, ["ssh"], secrets)

    await world.administration.update_user(user.number, password=password, protocols=["ssh"], also=grant)
    [login] = (await world.wanted()).values()
    assert (login.protocol, crypt.verify_password(password, login.secret)) == ("ssh", True)


async def test_an_account_without_logins_may_have_any_password(world: Any) -> None:
    user = await world.user()
    await world.administration.update_user(user.number, password="ein schönes neues " * 20)
    assert await world.wanted() == {}


async def test_limits_and_the_end_of_the_account_ride_along(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh")
    ends = now().replace(microsecond=0) + timedelta(days=3)
    await world.limit(user, expires_at=ends, max_sessions=2, rate_up=1_000_000, rate_down=2_000_000)
    await world.refresh(user)
    found = (await world.wanted())["ssh/alice"]
    assert found.not_after == int(ends.timestamp())
    assert found.limits == Limits(max_sessions=2, rate_up=1_000_000, rate_down=2_000_000)
    told = world.told[-1][1]
    assert (told.blocked, told.limits, told.not_after) == (None, found.limits, found.not_after)


@pytest.mark.parametrize(
    ("why", "block", "free"),
    [
        ("expired", {"expires_at": -1}, {"expires_at": 60}),
        ("quota", {"quota_bytes": 10, "used_bytes": 10}, {"used_bytes": 0}),
        ("inactive", None, None),
    ],
)
async def test_a_blocked_account_loses_its_logins_and_gets_the_same_ones_back(
    world: Any, why: str, block: dict[str, int] | None, free: dict[str, int] | None
) -> None:
    async def change(values: dict[str, int] | None, active: bool) -> None:
        if values is None:
            await world.set_active(user, active)
        elif "expires_at" in values:
            await world.limit(user, expires_at=now() + timedelta(seconds=values["expires_at"]))
        else:
            await world.limit(user, **values)
        await world.refresh(user)

    user, other = await world.user(), await world.user("bob")
    for each in (user, other):
        await world.grant(each, "ssh", "openvpn", "l2tp")
    before = await world.wanted()
    await change(block, False)
    assert set(await world.wanted()) == {"ssh/bob", "openvpn/bob", "l2tp/bob"}
    assert world.told[-1][1].blocked == why
    await change(free, True)
    after = await world.wanted()
    assert {key: found.secret for key, found in after.items()} == {key: found.secret for key, found in before.items()}


async def test_what_a_blocked_account_is_given_waits_for_the_end_of_the_block(world: Any) -> None:
    user = await world.user()
    await world.limit(user, quota_bytes=10, used_bytes=10)
    await world.grant(user, "ssh")
    await world.administration.update_user(user.number, password="another good one")
    assert await world.wanted() == {}
    await world.limit(user, used_bytes=0)
    await world.refresh(user)
    assert crypt.verify_password("another good one", (await world.wanted())["ssh/alice"].secret)


async def test_a_deactivated_account_loses_its_logins_in_the_same_transaction(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "l2tp")
    await world.administration.update_user(user.number, active=False)
    assert await world.wanted() == {}
    await world.administration.update_user(user.number, active=True)
    await world.refresh(user)
    assert set(await world.wanted()) == {"ssh/alice", "l2tp/alice"}


async def test_nothing_is_left_of_a_deleted_account(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "l2tp")
    await world.administration.delete_user(user.number)
    assert await world.wanted() == {}
    async with world.database.read() as session:
        assert await session.scalar(sa.select(sa.func.count()).select_from(CredentialRow)) == 0
        assert await session.scalar(sa.select(sa.func.count()).select_from(UserRow)) == 0


async def test_the_database_never_holds_a_password_or_its_hash_in_the_clear(world: Any, tmp_path: Path) -> None:
    user = await world.user()
    await world.grant(user, "ssh", "l2tp")
    wanted = await world.wanted()
    for secret in (PASSWORD, wanted["ssh/alice"].secret):
        assert held(tmp_path, secret.encode()) == []
        assert secret not in repr(wanted) and secret not in repr(await world.access.prepare(PASSWORD))


async def test_a_machine_that_cannot_hash_says_so(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(_password: str, _cost: int) -> str:
        raise crypt.CryptUnavailable("libcrypt.so.1 is not here")

    monkeypatch.setattr(crypt, "hash_password", unavailable)
    with pytest.raises(PasswordHashUnavailable, match=r"libcrypt\.so\.1 is not here"):
        await world.access.prepare(PASSWORD)
    await world.access.prepare(PASSWORD, ["l2tp"])  # needs none


async def test_ssh_logins_have_a_number_each_and_gaps_are_used_again(world: Any) -> None:
    world.access = Access(world.passwords, world.refresh_peers, tunnels=5)
    users = [await world.user(f"user{number}") for number in range(5)]
    for user in users:
        await world.grant(user, "ssh", "openvpn")
    wanted = await world.wanted()
    assert sorted(each.tunnel for key, each in wanted.items() if key.startswith("ssh/")) == [1, 2, 3, 4, 5]
    assert {each.tunnel for key, each in wanted.items() if key.startswith("openvpn/")} == {0}
    gone = wanted["ssh/user2"].tunnel
    await world.grant(users[2], "openvpn", password=None)
    await world.grant(users[0], "openvpn", "ssh", password="another password")
    await world.grant(await world.user("late"), "ssh")
    after = await world.wanted()
    assert after["ssh/late"].tunnel == gone
    assert after["ssh/user0"].tunnel == wanted["ssh/user0"].tunnel


async def test_a_login_of_the_version_before_gets_its_number_when_nodes_are_told_again(world: Any) -> None:
    user = await world.user()
    await world.grant(user, "ssh")
    async with world.database.transaction() as tx:
        await tx.session.execute(sa.update(CredentialRow).values(tunnel=None))
    await world.refresh(user)
    given = (await world.wanted())["ssh/alice"].tunnel
    assert 0 < given <= credentials.TUNNELS
    async with world.database.read() as session:
        assert await session.scalar(sa.select(CredentialRow.tunnel)) == given


async def test_a_number_that_was_given_back_is_not_the_next_ones(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies to the former user's flows still come to its address."""
    monkeypatch.setattr(credentials, "random", random.Random(1))
    given = []
    for number in range(20):
        user = await world.user(f"user{number}")
        await world.grant(user, "ssh")
        given += [each.tunnel for key, each in (await world.wanted()).items() if key.startswith("ssh/")]
        await world.grant(user)
    assert len(set(given)) == len(given) == 20


async def test_where_all_numbers_are_taken_the_next_is_beyond_the_pool(world: Any) -> None:
    world.access = Access(world.passwords, world.refresh_peers, tunnels=3)
    for number in range(5):
        await world.grant(await world.user(f"user{number}"), "ssh")
    assert sorted(each.tunnel for each in (await world.wanted()).values()) == [1, 2, 3, 4, 5]
