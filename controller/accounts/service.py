"""Use cases of accounts: create, log in and out, change, deactivate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from controller.accounts import errors, identity, tokens
from controller.accounts.passwords import Passwords
from controller.accounts.principal import Plan, Principal, Role
from controller.accounts.tables import LoginSessionRow, UserRow
from controller.accounts.throttle import Throttle
from controller.accounts.tokens import Sessions
from controller.errors import InvalidInput
from controller.store.database import Database, Topic, Transaction
from controller.store.types import new_id, now

FRESH = timedelta(minutes=15)  # a login so young needs no password again
_USER_AGENT_LENGTH = 255

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class User:
    id: str
    number: int
    username: str
    email: str
    email_verified: bool
    role: Role
    plan: Plan
    active: bool
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Client:
    """Who is at the other end of a login."""

    address: str = ""  # as text; empty for one on this machine
    user_agent: str = ""


EndService = Callable[[Transaction, str, str], Awaitable[object]]


class Accounts:
    """`end_services` end, in the same transaction, what a deactivated account still uses: (tx, user id, reason)."""

    def __init__(
        self,
        database: Database,
        passwords: Passwords,
        *,
        session_life: timedelta,
        end_services: Sequence[EndService] = (),
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._session_life = session_life
        self._end_services = end_services
        self._throttle = Throttle()
        self._sessions = Sessions(database)

    async def create_user(
        self, username: str, email: str, password: str, role: Role = Role.USER, plan: Plan = Plan.FREE
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
        _refuse(problems)
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
            created_at=moment,
            updated_at=moment,
        )
        async with self._database.transaction() as tx:
            tx.session.add(row)
            await _flush(tx.session)
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.created", user_id=row.id, role=role, plan=plan)
        return _user_from_row(row)

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
        return _user_from_row(row)

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
            account = await _row(tx.session, user.id, lock=True)
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

    async def logout(self, principal: Principal) -> None:
        async with self._database.transaction() as tx:
            await tx.session.execute(sa.delete(LoginSessionRow).where(LoginSessionRow.id == principal.session_id))
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.logout", user_id=principal.user_id, session_id=principal.session_id)

    async def get_user(self, user_id: str) -> User:
        async with self._database.read() as session:
            return _user_from_row(await _row(session, user_id))

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
            row = await _row(session, principal.user_id)
        problems: dict[str, str | None] = {}
        if password is not None:
            problems["password"] = identity.check_password(password, row.username, row.email)
        if email is not None:
            try:
                email = identity.parse_email(email)
            except ValueError as error:
                problems["email"] = str(error)
        _refuse(problems)
        if email is None and password is None:
            return _user_from_row(row)
        await self._prove(principal, row.password_hash, current_password, client)
        hashed = await self._passwords.hash(password) if password is not None else None
        async with self._database.transaction() as tx:
            row = await _row(tx.session, principal.user_id, lock=True)
            if email is not None and email != row.email:
                log.info("accounts.email_changed", user_id=row.id)
                row.email, row.email_key, row.email_verified = email, identity.fold(email), False
            if hashed is not None:
                row.password_hash = hashed
                await _end_sessions(tx, row.id, but=principal.session_id)
                log.info("accounts.password_changed", user_id=row.id)
            row.updated_at = now()
            await _flush(tx.session)
            tx.touch(Topic.ACCOUNTS)
        return _user_from_row(row)

    async def deactivate(self, user_id: str) -> None:
        """Refuse the account every login, and end its sessions and services."""
        async with self._database.transaction() as tx:
            row = await _row(tx.session, user_id, lock=True)
            row.active, row.updated_at = False, now()
            await _end_sessions(tx, user_id)
            for end_service in self._end_services:
                await end_service(tx, user_id, "deactivated")
            tx.touch(Topic.ACCOUNTS)
        log.info("accounts.deactivated", user_id=user_id)

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


async def hold_account(tx: Transaction, user_id: str) -> None:
    """Lock an active account until the commit, so that it cannot be deactivated meanwhile; raise InvalidToken."""
    active = await tx.session.scalar(sa.select(UserRow.active).where(UserRow.id == user_id).with_for_update())
    if not active:
        raise errors.InvalidToken


async def _row(session: AsyncSession, user_id: str, *, lock: bool = False) -> UserRow:
    statement = sa.select(UserRow).where(UserRow.id == user_id)
    row = await session.scalar(statement.with_for_update() if lock else statement)
    if row is None:
        raise errors.UserNotFound
    return row


async def _end_sessions(tx: Transaction, user_id: str, but: str = "") -> None:
    await tx.session.execute(
        sa.delete(LoginSessionRow).where(LoginSessionRow.user_id == user_id, LoginSessionRow.id != but)
    )


async def _flush(session: AsyncSession) -> None:
    """Write, and say in the account's words which rule of the table was broken."""
    try:
        await session.flush()
    except IntegrityError as error:
        reason = str(error.orig)
        if "username_key" in reason:
            raise errors.UsernameTaken from error
        if "email_key" in reason:
            raise errors.EmailTaken from error
        raise


def _refuse(problems: dict[str, str | None]) -> None:
    found = {field: reason for field, reason in problems.items() if reason is not None}
    if found:
        raise InvalidInput(found)


def _user_from_row(row: UserRow) -> User:
    return User(
        row.id,
        row.number,
        row.username,
        row.email,
        row.email_verified,
        Role(row.role),
        Plan(row.plan),
        row.active,
        row.created_at,
        row.updated_at,
    )
