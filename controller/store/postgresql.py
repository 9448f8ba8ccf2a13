"""PostgreSQL: its engine, how a transaction begins, and which of its errors pass."""

from __future__ import annotations

import socket
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

_CONNECT_TIMEOUT = 5.0
_SILENCE = 15  # seconds without a sign of life from PostgreSQL's machine
_ABANDONED = 30.0  # seconds after which the server ends a transaction that asks nothing: its process has stopped
_WRITER = 0x736B796E6574  # the advisory lock of whoever writes

# Conditions that pass, by SQLSTATE or its class: the connection lost, rolled back for another transaction, no room,
# ended by an operator, the machine's error; a lock not had in time, a standby, a transaction that took too long; a
# table that is not there or not ours yet (a backup is being restored), or changed (an upgrade).
_PASSING = ("08", "40", "53", "57", "58", "55P03", "25006", "25P03", "42P01", "42501", "0A000")

log = structlog.get_logger()


def make_engine(url: str, pool_size: int, busy_timeout: float) -> AsyncEngine:
    server_settings = {
        "application_name": "skynetvpn-controller",
        "lock_timeout": f"{busy_timeout:.0f}s",
        "idle_in_transaction_session_timeout": f"{_ABANDONED:.0f}s",
    }
    engine = create_async_engine(
        url,
        connect_args={"timeout": _CONNECT_TIMEOUT, "server_settings": server_settings},
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=True,  # what a restarted server has closed is replaced before it is used
    )
    sa.event.listen(engine.sync_engine, "do_connect", _Connecting())
    sa.event.listen(engine.sync_engine, "begin", _begin)
    return engine


def reader(engine: AsyncEngine) -> AsyncEngine:
    """Of transactions that see one moment."""
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def passes(error: BaseException | None) -> bool:
    """Whether the same may be done later."""
    return str(getattr(error, "sqlstate", None) or "").startswith(_PASSING)


class _Connecting:
    """Makes the connections; what keeps it from that is an error of the driver's kind, and logged once where one could
    be made before: who starts is told by the error."""

    def __init__(self) -> None:
        self._connected = False
        self._failing = False

    def __call__(self, dialect: Any, _record: object, arguments: list[Any], options: dict[str, Any]) -> Any:
        try:
            connection = dialect.loaded_dbapi.connect(*arguments, **options)
            _notice_silence(connection.driver_connection._transport.get_extra_info("socket"))
        except Exception as error:
            # The driver raises what the socket or the server said, before the engine's own translation begins.
            reason = str(error) or type(error).__name__
            if self._connected:
                log.warning("store.connect_failed", reason=reason)
                self._connected, self._failing = False, True
            raise dialect.loaded_dbapi.OperationalError(reason) from error
        if self._failing:
            log.info("store.connect_restored")
        self._connected, self._failing = True, False
        return connection


def _notice_silence(line: socket.socket) -> None:
    """A server that vanished without a word shall be an error soon, not after the kernel's quarter of an hour."""
    if line.family == socket.AF_UNIX:
        return
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE // 3)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENCE // 3)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE * 1000)


def _begin(connection: sa.Connection) -> None:
    # The server's default isolation, READ COMMITTED, is what a writer needs: each statement sees all that the writers
    # before have committed, which a snapshot taken before the lock would not.
    if connection.get_execution_options().get("write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER})")
