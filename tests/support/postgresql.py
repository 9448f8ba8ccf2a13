"""A PostgreSQL server of the tests' own: its files in a temporary folder, a Unix socket, no network.

It sorts as a user's own server does, by a language and not by bytes, so that nothing relies on the order of SQLite.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import asyncpg
import pytest

from tests.support.netns import wait_until

ENGINES = ("sqlite", "postgresql")
_FAST = (
    *("fsync=off", "full_page_writes=off", "autovacuum=off"),
    *("wal_level=minimal", "max_wal_senders=0", "shared_buffers=16MB"),
)
_USER = "postgres"  # that Debian's package makes; the server refuses to be root
_SECONDS = 60.0 * int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))


def only(engine: str) -> pytest.MarkDecorator:
    """For a test about one engine."""
    return pytest.mark.parametrize("engine", [engine])


def programs() -> Path | None:
    """Where the newest server on this machine has its programs."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda path: int(path.parent.name), default=None)


class Cluster:
    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._names = count()
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="skynetvpn-postgresql-"))
        try:
            if os.geteuid() == 0:
                account = pwd.getpwnam(_USER)
                os.chown(self.directory, account.pw_uid, account.pw_gid)
            language = ("--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US")
            self._run("initdb", "-D", str(self._data), "-U", _USER, "--auth=trust", "--no-sync", *language)
            self.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()

    def start(self) -> None:
        settings = [*_FAST, "listen_addresses=", f"unix_socket_directories={self.directory}", "max_connections=60"]
        options = [word for setting in settings for word in ("-c", setting)]
        with (self.directory / "log").open("ab") as log:
            self._server = subprocess.Popen(
                self._as_user("postgres", "-D", str(self._data), *options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, _SECONDS)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: connections are told; SIGQUIT: as if it had crashed."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(_SECONDS)
            self._server = None

    def create(self, template: str = "template1") -> str:
        """A new database, a copy of the template; return its name."""
        name = f"db{next(self._names)}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return name

    def drop(self, name: str) -> None:
        self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        return f"postgresql+asyncpg://{_USER}@/{name}?host={self.directory}"

    def sql(self, statement: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(host=str(self.directory), user=_USER, database=_USER)
            await connection.execute(statement)
            await connection.close()

        asyncio.run(run())

    @property
    def socket(self) -> Path:
        return self.directory / ".s.PGSQL.5432"

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _answers(self) -> bool:
        assert self._server is not None and self._server.poll() is None, (self.directory / "log").read_text()
        ready = [str(self._binaries / "pg_isready"), "-q", "-h", str(self.directory)]
        return subprocess.run(ready, check=False, timeout=_SECONDS).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            self._as_user(program, *arguments), cwd="/", capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"

    def _as_user(self, program: str, *arguments: str) -> list[str]:
        """What is started so does not outlive the tests, whatever becomes of them."""
        account = ["--reuid", _USER, "--regid", _USER, "--clear-groups"] if os.geteuid() == 0 else []
        return ["setpriv", "--pdeathsig", "INT", *account, "--", str(self._binaries / program), *arguments]

    def _clean(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
