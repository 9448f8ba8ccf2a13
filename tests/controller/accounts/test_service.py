"""Accounts: create, log in and out, change one's own."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import bcrypt
import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from controller.accounts import errors, tokens
from controller.accounts.administration import Administration
from controller.accounts.passwords import Passwords
from controller.accounts.principal import Plan, Principal, Role
from controller.accounts.service import Accounts, Client, User
from controller.accounts.tables import LoginSessionRow, UserRow
from controller.accounts.tokens import digest
from controller.errors import InvalidInput
from controller.store.database import Committed, Database, Topic
from controller.store.types import now

PASSWORD = "correct horse battery"
CLIENT = Client("203.0.113.7", "tests/1")
OTHER = Client("198.51.100.9", "tests/2")


async def make(accounts: Accounts, name: str = "alice") -> User:
    return await accounts.create_user(name, f"{name}@example.com", PASSWORD, Role.USER, Plan.PRO)


async def enter(accounts: Accounts, name: str = "alice", client: Client = CLIENT) -> tuple[str, Principal]:
    token, _ = await accounts.login(name, PASSWORD, "skynet", client)
    return token, await accounts.authenticate(token)


async def age_logins(database: Database, by: timedelta) -> None:
    async with database.transaction() as tx:
        for row in await tx.session.scalars(sa.select(LoginSessionRow)):
            row.created_at -= by
            row.expires_at -= by
        tx.touch(Topic.ACCOUNTS)


async def test_a_login_by_name_or_address_answers_a_token_for_its_holder(accounts: Accounts) -> None:
    user = await make(accounts)
    for identifier in ("alice", "ALICE", "alice@example.com", "Alice@Example.COM"):
        token, expires_at = await accounts.login(identifier, PASSWORD, "skynet", CLIENT)
        principal = await accounts.authenticate(token)
        assert (principal.user_id, principal.number, principal.plan) == (user.id, user.number, Plan.PRO)
        assert principal.contract == "skynet"
        assert timedelta(hours=23, minutes=59) < expires_at - now() <= timedelta(hours=24)


async def test_the_database_never_holds_a_token(accounts: Accounts, database: Database) -> None:
    await make(accounts)
    token, _ = await enter(accounts)
    async with database.read() as session:
        row = (await session.scalars(sa.select(LoginSessionRow))).one()
    assert row.token_hash == digest(token)
    assert token not in "".join(str(value) for value in vars(row).values())
    assert (row.ip_address, row.user_agent) == ("203.0.113.7", "tests/1")


async def test_unknown_names_and_wrong_passwords_are_refused_alike_and_cost_one_check_each(
    accounts: Accounts, administration: Administration, passwords: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(accounts)
    gone = await make(accounts, "gone")
    await administration.update_user(gone.number, active=False)
    hasher = passwords._argon2
    computed: list[str] = []

    class Counting:
        """Whether a hash is checked or made, the time that takes is the same."""

        def __getattr__(self, name: str) -> Any:
            computed.append(name)
            return getattr(hasher, name)

    monkeypatch.setattr(passwords, "_argon2", Counting())
    said = set()
    for number, (name, password) in enumerate(
        [("alice", "wrong password"), ("nobody", PASSWORD), ("nobody@example.com", "x"), ("gone", PASSWORD)], 1
    ):
        with pytest.raises(errors.InvalidCredentials) as caught:
            await accounts.login(name, password, "skynet", CLIENT)
        said.add((str(caught.value), caught.value.code))
        assert len(computed) == number and {*computed} <= {"hash", "verify"}
    assert len(said) == 1


async def test_logout_ends_the_token_at_once_and_no_other(accounts: Accounts) -> None:
    await make(accounts)
    first, holder = await enter(accounts)
    second, _ = await enter(accounts)
    await accounts.logout(holder)
    assert accounts.known(first) is None
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(first)
    assert (await accounts.authenticate(second)).username == "alice"


async def test_a_change_by_another_process_is_seen(accounts: Accounts, database: Database) -> None:
    await make(accounts)
    token, _ = await enter(accounts)
    assert accounts.known(token) is not None
    async with database.transaction() as tx:  # no topic: this process is not told by the commit itself
        await tx.session.execute(sa.delete(LoginSessionRow))
    assert accounts.known(token) is not None
    database.tell(Committed(frozenset({Topic.ACCOUNTS}), None))
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(token)


async def test_a_token_that_ends_while_it_is_looked_up_is_not_remembered(
    accounts: Accounts, database: Database
) -> None:
    await make(accounts)
    token, _ = await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    lookup = asyncio.ensure_future(accounts.authenticate(token))
    await asyncio.sleep(0)  # it has noted where the accounts stand, and waits for the database
    database.tell(Committed(frozenset({Topic.ACCOUNTS}), None))
    await lookup
    assert accounts.known(token) is None


async def test_a_token_ends_with_its_life(database: Database, passwords: Passwords) -> None:
    accounts = Accounts(database, passwords, session_life=timedelta(seconds=0))
    await make(accounts)
    token, _ = await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(token)
    assert await accounts.purge_sessions() == 1
    assert await accounts.purge_sessions() == 0


async def test_a_token_that_is_remembered_ends_with_its_life_too(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(accounts)
    token, _ = await enter(accounts)
    assert accounts.known(token) is not None
    later = time.time() + timedelta(hours=24, seconds=1).total_seconds()
    monkeypatch.setattr(tokens, "time", SimpleNamespace(time=lambda: later))
    assert accounts.known(token) is None
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(token)


async def test_no_session_opens_for_an_account_that_changed_after_its_password_was_checked(accounts: Accounts) -> None:
    await make(accounts)
    _, holder = await enter(accounts)
    verified = await accounts.verify("alice", PASSWORD, CLIENT)
    await accounts.update_me(holder, CLIENT, password="another good one")
    with pytest.raises(errors.InvalidCredentials):
        await accounts.open_session(verified, "skynet", CLIENT)


async def test_a_new_password_ends_the_other_logins(accounts: Accounts) -> None:
    await make(accounts)
    mine, holder = await enter(accounts)
    other, _ = await enter(accounts)
    await accounts.update_me(holder, CLIENT, password="another good one")
    assert (await accounts.authenticate(mine)).user_id == holder.user_id
    with pytest.raises(errors.InvalidToken):
        await accounts.authenticate(other)
    with pytest.raises(errors.InvalidCredentials):
        await accounts.login("alice", PASSWORD, "skynet", CLIENT)
    assert await accounts.login("alice", "another good one", "skynet", CLIENT)


async def test_an_older_login_has_to_give_the_password(accounts: Accounts, database: Database) -> None:
    await make(accounts)
    token, _ = await enter(accounts)
    await age_logins(database, timedelta(minutes=15))
    holder = await accounts.authenticate(token)
    for change in ({"password": "another good one"}, {"email": "new@example.com"}):
        with pytest.raises(errors.PasswordNeeded):
            await accounts.update_me(holder, CLIENT, **change)
        with pytest.raises(errors.WrongPassword):
            await accounts.update_me(holder, CLIENT, **change, current_password="wrong password")
    changed = await accounts.update_me(
        holder, CLIENT, password="another good one", email="new@example.com", current_password=PASSWORD
    )
    assert changed.email == "new@example.com"


async def test_a_changed_address_is_unverified_and_can_be_logged_in_with(
    accounts: Accounts, database: Database
) -> None:
    user = await make(accounts)
    async with database.transaction() as tx:
        await tx.session.execute(sa.update(UserRow).values(email_verified=True))
    _, holder = await enter(accounts)
    changed = await accounts.update_me(holder, CLIENT, email="Alice.New@Example.com")
    assert (changed.email, changed.email_verified) == ("Alice.New@example.com", False)
    assert changed.updated_at > user.updated_at
    assert changed.created_at == user.created_at
    assert await accounts.get_user(user.id) == changed
    assert (await accounts.verify("alice.new@example.com", PASSWORD, CLIENT)).id == user.id


async def test_names_and_addresses_are_unique_whatever_their_case(accounts: Accounts) -> None:
    await make(accounts)
    await make(accounts, "bob")
    with pytest.raises(errors.UsernameTaken):
        await accounts.create_user("alice", "second@example.com", PASSWORD)
    with pytest.raises(errors.EmailTaken):
        await accounts.create_user("second", "ALICE@example.com", PASSWORD)
    _, bob = await enter(accounts, "bob")
    with pytest.raises(errors.EmailTaken):
        await accounts.update_me(bob, CLIENT, email="alice@example.com")
    assert (await accounts.get_user(bob.user_id)).email == "bob@example.com"


async def test_of_two_accounts_made_at_once_with_one_name_one_is_made(accounts: Accounts) -> None:
    made = await asyncio.gather(
        *(accounts.create_user("alice", f"a{number}@example.com", PASSWORD) for number in range(4)),
        return_exceptions=True,
    )
    assert sorted(type(item).__name__ for item in made) == ["User", *["UsernameTaken"] * 3]


async def test_every_wrong_field_is_named(accounts: Accounts) -> None:
    with pytest.raises(InvalidInput) as caught:
        await accounts.create_user("Root!", "nowhere", "short")
    assert set(caught.value.problems) == {"username", "email", "password"}


async def test_a_bcrypt_hash_is_verified_and_replaced(accounts: Accounts, database: Database) -> None:
    await make(accounts)
    long = "é" * 60  # 120 bytes; bcrypt never saw more than 72
    old = bcrypt.hashpw(long.encode()[:72], bcrypt.gensalt(4)).decode().replace("$2b$", "$2y$")
    async with database.transaction() as tx:
        await tx.session.execute(sa.update(UserRow).values(password_hash=old))
    assert await accounts.login("alice", long, "skynet", CLIENT)
    async with database.read() as session:
        replaced = await session.scalar(sa.select(UserRow.password_hash))
    assert replaced is not None
    assert replaced.startswith("$argon2id$")
    assert await accounts.login("alice", long, "skynet", CLIENT)


async def test_guessing_is_stopped_for_the_guesser_and_not_for_the_owner(accounts: Accounts) -> None:
    await make(accounts)
    for _ in range(10):
        with pytest.raises(errors.InvalidCredentials):
            await accounts.login("alice", "a wrong guess", "skynet", OTHER)
    with pytest.raises(errors.TooManyAttempts) as caught:
        await accounts.login("alice@example.com", PASSWORD, "skynet", OTHER)  # the other name is the same account
    assert 0 < int(str(caught.value.params["retry_after"])) <= 900
    assert await accounts.login("alice", PASSWORD, "skynet", CLIENT)


async def test_the_owner_gets_in_while_thousands_of_addresses_guess(accounts: Accounts) -> None:
    await make(accounts)
    refused = 0
    for number in range(150):
        for _ in range(3):
            try:
                await accounts.login("alice", "a wrong guess", "skynet", Client(f"2001:db8:{number:x}::1"))
            except errors.TooManyAttempts:
                refused += 1
            except errors.InvalidCredentials:
                continue
    assert refused > 100  # once it is an attack, an address has two attempts
    assert await accounts.login("alice", PASSWORD, "skynet", CLIENT)


async def test_addresses_of_one_subscriber_are_one_guesser(accounts: Accounts) -> None:
    await make(accounts)
    for number in range(10):
        with pytest.raises(errors.InvalidCredentials):
            await accounts.login("alice", "a wrong guess", "skynet", Client(f"2001:db8::{number:x}"))
    with pytest.raises(errors.TooManyAttempts):
        await accounts.login("alice", "a wrong guess", "skynet", Client("2001:db8::ffff:1"))


async def test_logs_hold_neither_passwords_nor_tokens_nor_what_was_typed_as_a_name(accounts: Accounts) -> None:
    with capture_logs() as logs:
        await make(accounts)
        token, holder = await enter(accounts)
        with pytest.raises(errors.InvalidCredentials):
            await accounts.login("canary-name", "canary-password", "skynet", CLIENT)
        await accounts.update_me(holder, CLIENT, password="canary-new-password")
        await accounts.logout(holder)
    assert [entry["event"] for entry in logs] == [
        "accounts.created",
        "accounts.login",
        "accounts.login_failed",
        "accounts.password_changed",
        "accounts.logout",
    ]
    for secret in (token, PASSWORD, "canary"):
        assert secret not in str(logs)
