"""What an administrator does with accounts."""

from __future__ import annotations

from datetime import timedelta

import pytest

from controller.accounts import errors
from controller.accounts.administration import Administration
from controller.accounts.newpassword import PasswordChanges
from controller.accounts.passwords import Passwords
from controller.accounts.principal import Plan, Role
from controller.accounts.service import FRESH, Accounts, Client, User
from controller.errors import InvalidInput
from controller.store.database import Database, Transaction
from controller.store.types import now

PASSWORD = "correct horse battery"
CLIENT = Client("203.0.113.7", "tests/1")


async def make(accounts: Accounts, name: str = "alice", role: Role = Role.USER) -> User:
    return await accounts.create_user(name, f"{name}@example.com", PASSWORD, role)


class Follower:
    """Another room that keeps something made of the password."""

    def __init__(self) -> None:
        self.kept: dict[str, object] = {}

    async def prepare(self, password: str) -> object:
        if password.startswith("useless"):
            raise InvalidInput({"password": "of no use"})
        return f"made of {password}"

    async def change_password(self, _tx: Transaction, user_id: str, prepared: object) -> None:
        self.kept[user_id] = prepared


async def test_users_are_listed_by_number_and_found_by_number_and_name(
    accounts: Accounts, administration: Administration
) -> None:
    made = [await make(accounts, name) for name in ("zoe", "alice")]
    assert await administration.list_users() == made
    assert await administration.user_by_number(made[1].number) == made[1]
    assert await administration.user_by_name("ZOE") == made[0]
    for number in (0, -1, 10**12):
        with pytest.raises(errors.UserNotFound):
            await administration.user_by_number(number)


async def test_deactivation_ends_every_login_and_service_and_refuses_new_ones(
    accounts: Accounts, database: Database, passwords: Passwords
) -> None:
    ended = []

    async def end_service(_tx: Transaction, user_id: str, reason: str) -> None:
        ended.append((user_id, reason))

    administration = Administration(database, PasswordChanges(passwords), [end_service])
    user = await make(accounts)
    tokens = [(await accounts.login("alice", PASSWORD, "skynet", CLIENT))[0] for _ in range(3)]
    assert not (await administration.update_user(user.number, active=False)).active
    for token in tokens:
        with pytest.raises(errors.InvalidToken):
            await accounts.authenticate(token)
    with pytest.raises(errors.InvalidCredentials):
        await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    assert ended == [(user.id, "deactivated")]
    await administration.update_user(user.number, active=True)
    await accounts.login("alice", PASSWORD, "skynet", CLIENT)


async def test_a_new_password_ends_every_login_and_reaches_whoever_follows_it(
    accounts: Accounts, database: Database, passwords: Passwords
) -> None:
    follower = Follower()
    administration = Administration(database, PasswordChanges(passwords, [follower]))
    user = await make(accounts)
    token, _ = await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    await administration.update_user(user.number, password="another good one")
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(token)
    await accounts.login("alice", "another good one", "skynet", CLIENT)
    assert follower.kept == {user.id: "made of another good one"}
    with pytest.raises(InvalidInput):
        await administration.update_user(user.number, password="useless for them", email="new@example.com")
    assert (await administration.user_by_number(user.number)).email == "alice@example.com"


async def test_protocols_reach_the_holder_of_a_token(accounts: Accounts, administration: Administration) -> None:
    user = await make(accounts)
    token, _ = await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    assert (await accounts.authenticate(token)).protocols is None
    await administration.update_user(user.number, protocols=["ssh", "l2tp"])
    assert (await accounts.authenticate(token)).protocols == ("ssh", "l2tp")
    await administration.update_user(user.number, protocols=[])
    assert (await accounts.authenticate(token)).protocols == ()


async def test_what_another_room_refuses_undoes_the_whole_change(
    accounts: Accounts, administration: Administration
) -> None:
    async def refuse(_tx: Transaction, _user: User) -> None:
        raise InvalidInput({"protocols": "no"})

    user = await make(accounts)
    with pytest.raises(InvalidInput):
        await administration.update_user(user.number, email="new@example.com", active=False, also=refuse)
    assert await administration.user_by_number(user.number) == user
    with pytest.raises(InvalidInput):
        await accounts.create_user("bob", "bob@example.com", PASSWORD, also=refuse)
    assert [found.username for found in await administration.list_users()] == ["alice"]


async def test_the_last_administrator_stays(accounts: Accounts, administration: Administration) -> None:
    first = await make(accounts, "root-a", Role.ADMIN)
    with pytest.raises(errors.LastAdmin):
        await administration.delete_user(first.number)
    with pytest.raises(errors.LastAdmin):
        await administration.update_user(first.number, active=False)
    second = await make(accounts, "root-b", Role.ADMIN)
    await administration.update_user(first.number, active=False)
    with pytest.raises(errors.LastAdmin):
        await administration.delete_user(second.number)
    await administration.delete_user(first.number)


async def test_role_and_plan_reach_the_holder_of_a_token(accounts: Accounts, administration: Administration) -> None:
    await make(accounts, "root-a", Role.ADMIN)
    user = await make(accounts)
    token, _ = await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    changed = await administration.update_user(user.number, role=Role.ADMIN, plan=Plan.PRO)
    assert (changed.role, changed.plan) == (Role.ADMIN, Plan.PRO)
    holder = await accounts.authenticate(token)
    assert (holder.role, holder.plan) == (Role.ADMIN, Plan.PRO)
    await administration.update_user(user.number, role=Role.USER)
    assert (await accounts.authenticate(token)).role is Role.USER


async def test_the_last_administrator_keeps_the_role(accounts: Accounts, administration: Administration) -> None:
    first = await make(accounts, "root-a", Role.ADMIN)
    second = await make(accounts, "root-b", Role.ADMIN)
    await administration.update_user(second.number, active=False)
    with pytest.raises(errors.LastAdmin):
        await administration.update_user(first.number, role=Role.USER, plan=Plan.PRO)
    assert await administration.user_by_number(first.number) == first
    await administration.update_user(first.number, role=Role.ADMIN)
    await administration.update_user(second.number, active=True)
    assert (await administration.update_user(first.number, role=Role.USER)).role is Role.USER


async def test_a_deleted_account_is_gone_with_its_logins_and_its_name_is_free(
    accounts: Accounts, administration: Administration
) -> None:
    user = await make(accounts)
    token, _ = await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    await administration.delete_user(user.number)
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(token)
    with pytest.raises(errors.UserNotFound):
        await administration.delete_user(user.number)
    assert (await make(accounts)).id != user.id


async def test_a_renewed_token_replaces_the_old_one_and_its_login_is_no_younger(accounts: Accounts) -> None:
    await make(accounts)
    token, _ = await accounts.login("alice", PASSWORD, "irssh", CLIENT)
    holder = await accounts.authenticate(token)
    newer = await accounts.renew(holder, CLIENT)
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(token)
    renewed = await accounts.authenticate(newer)
    assert (renewed.session_id, renewed.contract) == (holder.session_id, "irssh")
    assert renewed.logged_in_at == holder.logged_in_at
    assert now() - renewed.logged_in_at < min(FRESH, timedelta(minutes=1))
    with pytest.raises(errors.InvalidToken):  # of two at once with the same token only one gets a new one
        await accounts.renew(holder, CLIENT)
