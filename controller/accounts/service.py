"""Use cases of accounts: create, log in and out, change one's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
import structlog

from controller.accounts import errors, identity, rows, tokens
from controller.accounts.newpassword import PasswordChanges
from controller.accounts.passwords import Passwords
from controller.accounts.principal import Plan, Principal, Role
from controller.accounts.rows import User as User
from controller.accounts.tables import LoginSessionRow, UserRow
from controller.accounts.throttle import Throttle
from controller.accounts.tokens import Sessions
from controller.store.database import Database, Topic, Transaction
from controller.store.types import new_id, now

FRESH = timedelta(minutes=15)  # a login so young needs no password again
_USER_AGENT_LENGTH = 255

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Client:
    """Who is at the other end of a login."""

    address: str = ""  # as text; empty for one on this machine
    user_agent: str = ""


# What ends in the same transaction: (tx, user id, reason).
EndService = Callable[[Transaction, str, str], Awaitable[object]]
Also = Callable[[Transaction, User], Awaitable[object]]
"""What another room does with the account in the same transaction."""


class Accounts:
    def __init__(
        self,
        database: Database,
        passwords: Passwords,
        *,
        session_life: timedelta,
        changes: PasswordChanges | None = None,
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._session_life = session_life
        self._changes = changes or PasswordChanges(passwords)
        self._throttle = Throttle()
        self._sessions = Sessions(database)

    async def create_user(
        self,
        username: str,
        email: str,
        password: str,
        role: Role = Role.USER,
        plan: Plan = Plan.FREE,
        *,
        protocols: Sequence[str] | None = None,
        also: Also | None = None,
    ) -> User:
        """Raise InvalidInput, UsernameTaken or EmailTaken."""
        problems: dict[str, str | None] = {
            "username": identity.check_username(username),
            "password": identity.check_password(password, username, email),
        }
        try:
            email = identity.parse_email(email)
        except ValueError as error:
            problems["email"] = str(error)
        rows.refuse(problems)
        hashed, moment = await self._passwords.hash(password), now()
        row = UserRow(
            id=new_id(),
            username=username,
            username_key=identity.fold(username),
            email=email,
            email_key=identity.fold(email),
            email_verified=False,
            password_hash=hashed,
            role=role,
            plan=plan,
            active=True,
            protocols=" ".join(protocols) if protocols is not None else None,
            created_at=moment,
            updated_at=moment,
        )
        async with self._database.transaction() as tx:
            tx.session.add(row)
            await rows.flush(tx.session)
            if also is not None:
                await also(tx, rows.user_from_row(row))
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.created", user_id=row.id, role=role, plan=plan)
        return rows.user_from_row(row)

    async def login(self, identifier: str, password: str, contract: str, client: Client) -> tuple[str, datetime]:
        """The token of a new login session and when it ends; raise InvalidCredentials or TooManyAttempts."""
        return await self.open_session(await self.verify(identifier, password, client), contract, client)

    async def verify(self, identifier: str, password: str, client: Client) -> User:
        """The account with this user name or e-mail address and password; raise as `login`."""
        key = identity.fold(identifier)
        async with self._database.read() as session:
            row = await session.scalar(
                sa.select(UserRow).where(sa.or_(UserRow.username_key == key, UserRow.email_key == key))
            )
        account = row.id if row is not None else key
        self._throttle.attempt(account, client.address)
        fits = await self._passwords.verify(row.password_hash if row is not None else None, password)
        if row is None or not fits or not row.active:
            # What was typed as a name is not logged: now and then it is the password.
            log.info("accounts.login_failed", user_id=row.id if row is not None else None, address=client.address)
            raise errors.InvalidCredentials
        self._throttle.succeeded(account, client.address)
        if self._passwords.outdated(row.password_hash):
            await self._rehash(row, password)
        return rows.user_from_row(row)

    async def open_session(self, user: User, contract: str, client: Client) -> tuple[str, datetime]:
        """A login session for an account that has just proved itself: its token, and when it ends."""
        token, moment = tokens.new_token(), now()
        expires_at = moment + self._session_life
        row = LoginSessionRow(
            id=new_id(),
            user_id=user.id,
            contract=contract,
            token_hash=tokens.digest(token),
            created_at=moment,
            expires_at=expires_at,
            ip_address=client.address,
            user_agent=client.user_agent[:_USER_AGENT_LENGTH],
        )
        async with self._database.transaction() as tx:
            account = await rows.row(tx.session, user.id, lock=True)
            if not account.active or account.updated_at != user.updated_at:
                raise errors.InvalidCredentials  # changed or deactivated since the password was checked
            tx.session.add(row)
        log.info("accounts.login", user_id=user.id, session_id=row.id, contract=contract, address=client.address)
        return token, expires_at

    def known(self, token: str) -> Principal | None:
        """What `authenticate` would answer, if that needs no database."""
        return self._sessions.known(token)

    async def authenticate(self, token: str) -> Principal:
        """Who holds the token; raise InvalidToken."""
        return await self._sessions.find(token)

    async def renew(self, principal: Principal, client: Client) -> str:
        """A new token for the login session, in place of the old one; raise InvalidToken where that has gone meanwhile.

        The login does not get younger: what needs a recent one needs the password.
        """
        token = tokens.new_token()
        async with self._database.transaction() as tx:
            renewed = await tx.session.execute(
                sa.update(LoginSessionRow)
                .where(LoginSessionRow.id == principal.session_id, LoginSessionRow.token_hash == principal.token_hash)
                .values(
                    token_hash=tokens.digest(token),
                    expires_at=now() + self._session_life,
                    ip_address=client.address,
                    user_agent=client.user_agent[:_USER_AGENT_LENGTH],
                )
            )
            if renewed.rowcount == 0:  # type: ignore[attr-defined]
                raise errors.InvalidToken
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.token_renewed", user_id=principal.user_id, session_id=principal.session_id)
        return token

    async def logout(self, principal: Principal) -> None:
        async with self._database.transaction() as tx:
            await tx.session.execute(sa.delete(LoginSessionRow).where(LoginSessionRow.id == principal.session_id))
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.logout", user_id=principal.user_id, session_id=principal.session_id)

    async def get_user(self, user_id: str) -> User:
        async with self._database.read() as session:
            return rows.user_from_row(await rows.row(session, user_id))

    async def update_me(
        self,
        principal: Principal,
        client: Client,
        *,
        email: str | None = None,
        password: str | None = None,
        current_password: str | None = None,
    ) -> User:
        """Change the caller's own e-mail address or password.

        Either hands the account over to whoever does it, so a login older than FRESH has to give the password again.
        A new password ends the account's other login sessions; a new address has to be verified again.
        """
        async with self._database.read() as session:
            row = await rows.row(session, principal.user_id)
        problems: dict[str, str | None] = {}
        if password is not None:
            problems["password"] = identity.check_password(password, row.username, row.email)
        if email is not None:
            try:
                email = identity.parse_email(email)
            except ValueError as error:
                problems["email"] = str(error)
        rows.refuse(problems)
        if email is None and password is None:
            return rows.user_from_row(row)
        await self._prove(principal, row.password_hash, current_password, client)
        new = await self._changes.prepare(password) if password is not None else None
        async with self._database.transaction() as tx:
            row = await rows.row(tx.session, principal.user_id, lock=True)
            rows.set_email(row, email)
            if new is not None:
                await self._changes.make(tx, row, new, but=principal.session_id)
            row.updated_at = now()
            await rows.flush(tx.session)
            tx.touch(Topic.ACCOUNTS)
        return rows.user_from_row(row)

    async def purge_sessions(self) -> int:
        """Drop the login sessions that have run out; how many there were."""
        async with self._database.transaction() as tx:
            purged = await tx.session.execute(sa.delete(LoginSessionRow).where(LoginSessionRow.expires_at <= now()))
        count: int = purged.rowcount  # type: ignore[attr-defined]
        return count

    async def _prove(self, principal: Principal, hashed: str, password: str | None, client: Client) -> None:
        if password is None:
            if datetime.now(UTC) - principal.logged_in_at >= FRESH:
                raise errors.PasswordNeeded
            return
        self._throttle.attempt(principal.user_id, client.address)
        if not await self._passwords.verify(hashed, password):
            raise errors.WrongPassword
        self._throttle.succeeded(principal.user_id, client.address)

    async def _rehash(self, row: UserRow, password: str) -> None:
        hashed = await self._passwords.hash(password)
        async with self._database.transaction() as tx:
            # Only the hash that was just verified: the password may have been changed meanwhile.
            await tx.session.execute(
                sa.update(UserRow)
                .where(UserRow.id == row.id, UserRow.password_hash == row.password_hash)
                .values(password_hash=hashed)
            )
        log.info("accounts.rehashed", user_id=row.id)


async def hold_account(tx: Transaction, user_id: str) -> User:
    """Lock an active account until the commit, so that it cannot be deactivated meanwhile; raise InvalidToken."""
    row = await tx.session.scalar(sa.select(UserRow).where(UserRow.id == user_id).with_for_update())
    if row is None or not row.active:
        raise errors.InvalidToken
    return rows.user_from_row(row)
