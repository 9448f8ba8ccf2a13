"""The command line as an operator meets it: a real directory, and real processes where it is about them.

What is only said and stored is asked of main() in this process, which has imported it already."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import aiohttp
import pytest
import sqlalchemy as sa
import yaml
from structlog.testing import capture_logs

from controller import log
from controller.__main__ import main
from controller.accounts.tables import UserRow
from controller.config import new_secret_line, read_secrets
from controller.desired.tables import DesiredRow
from controller.events.tables import EventRow
from controller.fleet.tables import NodeRow
from controller.store.database import Database, open_database
from controller.usage.tables import LimitsRow, SessionRow, UsageRow
from shared import jointoken

PASSWORD = "correct horse battery"


async def controller(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "controller",
        *map(str, arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def typed(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
    """The same without a process of its own."""
    return await asyncio.to_thread(_typed, [str(argument) for argument in arguments], stdin)


def _typed(arguments: list[str], stdin: str) -> tuple[int, str, str]:
    status, umask = 0, os.umask(0o022)
    with (
        patch.multiple(sys, argv=["skynetvpn-controller", *arguments], stdin=io.StringIO(stdin)),
        redirect_stdout(io.StringIO()) as output,
        redirect_stderr(io.StringIO()) as errors,
        patch.object(log, "configure"),  # it is for the whole process, and for ever
        capture_logs() as logged,
    ):
        try:
            main()
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            status = ended.code
        finally:
            os.umask(umask)
    assert [event for event in logged if event["log_level"] not in ("debug", "info")] == []
    return status, output.getvalue(), errors.getvalue()


class Desk:
    """An administrator at the command line of one controller."""

    def __init__(self, directory: Path) -> None:
        self._config = directory / "controller.yaml"
        secrets = read_secrets(directory / "secret.key")
        self.database: Database = open_database(f"sqlite+aiosqlite:///{directory}/controller.db", secrets)

    async def types(self, *arguments: str, stdin: str = "") -> str:
        status, output, errors = await typed(*arguments, "--config", self._config, stdin=stdin)
        assert (status, errors) == (0, "")
        return output

    async def fails(self, *arguments: str) -> str:
        status, output, errors = await typed(*arguments, "--config", self._config)
        assert (status, output) == (1, "")
        return errors

    async def asks(self, *arguments: str) -> Any:
        return json.loads(await self.types(*arguments, "-o", "json"))

    async def adds(self, name: str, *options: str) -> None:
        add = ("user", "add", name, "--email", f"{name}@example.org", "--password-stdin")
        await self.types(*add, *options, stdin=f"{PASSWORD}\n")

    async def ids(self) -> tuple[dict[str, str], dict[str, str]]:
        """Of accounts and of nodes, by name."""
        async with self.database.read() as session:
            users = {row.username: row.id for row in await session.scalars(sa.select(UserRow))}
            return users, {row.name: row.id for row in await session.scalars(sa.select(NodeRow))}

    async def stores(self, *rows: object) -> None:
        async with self.database.transaction() as tx:
            tx.session.add_all(rows)

    async def to_end(self) -> set[str]:
        """The sessions that nodes are told to end."""
        asked = sa.select(DesiredRow.key).where(DesiredRow.kind == "session.end", DesiredRow.deleted.is_(False))
        async with self.database.connect() as connection:
            return set(await connection.scalars(asked))


@pytest.fixture
async def desk(directory: Path) -> AsyncIterator[Desk]:
    desk = Desk(directory)
    yield desk
    await desk.database.close()


def session_row(name: str, user_id: str, node_id: str, **columns: Any) -> SessionRow:
    values: dict[str, Any] = {
        "protocol": "openvpn", "username": "x", "connection_id": None, "remote": "203.0.113.9:4711",
        "address": "10.67.0.2", "started_at": datetime(2026, 11, 1, 12, tzinfo=UTC), "rx": 1_500_000, "tx": 20,
        "exact": True,
    }  # fmt: skip
    return SessionRow(id=name, user_id=user_id, node_id=node_id, **(values | columns))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A controller's directory, to be copied."""
    made = tmp_path_factory.mktemp("made") / "controller"
    assert _typed(["init", "--dir", str(made)], "")[0] == 0
    return made


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(made, tmp_path / "controller")
    listen = {name: f"127.0.0.1:{free_port()}" for name in ("listen", "node_listen")}
    (copy / "controller.yaml").write_text(yaml.safe_dump(settings_of(copy) | listen))
    return copy


def settings_of(directory: Path) -> dict[str, str]:
    return dict(yaml.safe_load((directory / "controller.yaml").read_text()))


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controller", "run", "--config", str(directory / "controller.yaml"),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            async for line in process.stderr:
                if b"controller.ready" in line:
                    break
            else:
                raise AssertionError("the controller ended before it was ready")
        drain = asyncio.create_task(process.stderr.read())
        yield "http://" + settings_of(directory)["listen"]
        process.terminate()
        assert await process.wait() == 0
        await drain
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
def full() -> Iterator[BinaryIO]:
    with Path("/dev/full").open("wb") as file:
        yield file


async def test_a_full_disk_under_its_log_does_not_end_it(directory: Path, full: BinaryIO) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controller", "run", "--config", str(directory / "controller.yaml"), stderr=full
    )
    try:
        async with aiohttp.ClientSession("http://" + settings_of(directory)["listen"]) as session, asyncio.timeout(30):
            for _ in range(3):  # a line of the access log each
                while not await _answers(session):
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _answers(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/api/servers") as answer:
            return answer.status == 401
    except aiohttp.ClientError:
        return False


def open_to_others(directory: Path) -> list[Path]:
    return [path for path in [directory, *directory.rglob("*")] if stat.S_IMODE(path.stat().st_mode) & 0o077]


async def test_what_init_makes_is_for_its_owner_only(tmp_path: Path) -> None:
    made = tmp_path / "controller"
    addresses = ("--listen", "127.0.0.1:1", "--node-listen", "127.0.0.1:2", "--node-address", "vpn.example.org:3")
    status, output, errors = await controller("init", "--dir", made, *addresses)
    assert (status, errors) == (0, "")
    assert "the API will listen on 127.0.0.1:1, nodes will dial vpn.example.org:3\n" in output
    assert settings_of(made)["node_listen"] == "127.0.0.1:2"
    assert open_to_others(made) == []
    status, _, errors = await controller("init", "--dir", made)
    assert status == 1
    assert "exists already" in errors


@pytest.mark.parametrize("size", [0, 300, 5000])  # of the largest file: no authority, half of one, half a database
async def test_a_failed_init_is_one_line_and_can_be_repeated(tmp_path: Path, size: int) -> None:
    made = tmp_path / "controller"
    process = await asyncio.create_subprocess_exec(
        "prlimit", f"--fsize={size}", sys.executable, "-m", "controller", "init", "--dir", str(made),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert (process.returncode, output) == (1, b"")
    [line] = errors.decode().splitlines()
    assert line.startswith(f"skynetvpn-controller: cannot make {made}: ")
    assert line.endswith("; when that is mended, run init again")
    assert ("File too large" in line) if size < 5000 else (f"{made}/controller.db: disk I/O error" in line)
    assert not [file.name for file in made.rglob("*") if file.name.startswith(".")]
    assert (await typed("init", "--dir", made))[0] == 0


@pytest.mark.parametrize("command", [("run",), ("user", "list")])
async def test_a_database_that_cannot_be_had_is_named_with_the_reason(
    directory: Path, command: tuple[str, ...]
) -> None:
    nowhere = directory / "nosuch" / "x.db"
    changed = settings_of(directory) | {"database_url": f"sqlite+aiosqlite:///{nowhere}"}
    (directory / "controller.yaml").write_text(yaml.safe_dump(changed))
    status, output, errors = await controller(*command, "--config", directory / "controller.yaml")
    assert (status, output) == (1, "")
    assert errors == (f"skynetvpn-controller: the database is not available: {nowhere}: unable to open database file\n")


async def test_the_command_that_init_tells_works_as_typed(tmp_path: Path) -> None:
    status, output, _ = await controller("init", "--dir", tmp_path / "controller")
    assert status == 0
    (line,) = [line for line in output.splitlines() if line.startswith("next: ")]
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "skynetvpn-controller"
    for second, told in (("another", 1), (PASSWORD, 0)):
        assert await at_a_terminal(arguments, PASSWORD, second) == told
    status, _, errors = await controller(*arguments)
    assert (status, len(errors.splitlines())) == (1, 1)
    assert "--password-stdin" in errors


async def at_a_terminal(arguments: list[str], *answers: str) -> int:
    """The exit status of somebody who types an answer to each question."""
    terminal, stdin = os.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "controller", *arguments,
            stdin=stdin, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stderr is not None
        for answer in answers:
            question = await process.stderr.readuntil(b": ")
            assert answer.encode() not in question
            os.write(terminal, f"{answer}\n".encode())
        await process.stderr.read()
        return await process.wait()
    finally:
        os.close(stdin)
        os.close(terminal)


async def test_it_is_administered_beside_the_running_one(directory: Path) -> None:
    config = directory / "controller.yaml"
    async with running(directory) as url, aiohttp.ClientSession(url) as api:
        add = ("user", "add", "alice", "--email", "alice@example.org", "--role", "admin", "--password-stdin")
        status, output, errors = await controller(*add, "--config", config, stdin=PASSWORD + "\n")
        assert (status, output, errors) == (0, "added alice (admin, plan free)\n", "")
        async with api.post("/api/auth/login", json={"username": "alice", "password": PASSWORD}) as answer:
            assert answer.status == 200
        status, _, errors = await controller(*add, "--config", config, stdin=PASSWORD + "\n")
        assert status == 1
        assert errors.startswith("skynetvpn-controller: ")
        assert "Traceback" not in errors

        token = ("node", "token", "--name", "fra1", "--country", "DE", "--city", "Frankfurt", "--config", config)
        status, output, errors = await controller(*token, "--protocols", "wireguard,ssh")
        assert (status, errors) == (0, "")
        assert jointoken.decode(output).address == settings_of(directory)["node_listen"]
        status, output, _ = await typed("node", "list", "--config", config)
        header, node = (line.split("\t") for line in output.splitlines())
        assert (status, header[:3], node[:3]) == (0, ["NAME", "STATUS", "PLACE"], ["fra1", "enabled", "DE Frankfurt"])
        assert (len(header), len(node), node[-3:]) == (7, 7, ["never", "wireguard", "-"])
        status, output, _ = await typed("node", "status", "fra1", "--config", config)
        shown = dict(line.split(None, 1) for line in output.splitlines())
        assert (status, shown["status"], shown["wireguard"], shown["problem"]) == (0, "enabled", "-", "-")
        status, output, errors = await typed("node", "status", "fra1", "maintenance", "--config", config)
        assert (status, output, errors) == (0, "the status of fra1 is maintenance\n", "")
        status, _, errors = await typed("node", "confirm", "fra1", "--config", config)
        assert status == 1
        assert "fra1" in errors


async def test_sessions_are_listed_and_ended(desk: Desk) -> None:
    assert await desk.types("session", "list") == "USER\tPROTOCOL\tNODE\tADDRESS\tFROM\tSINCE\tRX\tTX\tID\n"
    for name in ("alice", "bob"):
        await desk.adds(name)
    for name in ("fra1", "ams1"):
        await desk.types("node", "token", "--name", name, "--country", "DE", "--city", "x")
    users, nodes = await desk.ids()
    later = datetime(2026, 11, 2, tzinfo=UTC)
    await desk.stores(
        session_row("s1", users["alice"], nodes["fra1"]),
        session_row("s2", users["alice"], nodes["ams1"], protocol="ssh", address="", started_at=later),
        session_row("s3", users["bob"], nodes["fra1"], started_at=later),
        session_row("s4", users["bob"], nodes["fra1"], ended_at=later),
    )

    lines = (await desk.types("session", "list")).splitlines()
    since = "2026-11-01T12:00:00Z"
    first = ["alice", "openvpn", "fra1", "10.67.0.2", "203.0.113.9:4711", since, "1.5 MB", "20 B", "s1"]
    assert lines[1].split("\t") == first
    assert [line.split("\t")[-1] for line in lines[1:]] == ["s1", "s2", "s3"]
    for option, value, wanted in (("--user", "alice", ["s1", "s2"]), ("--node", "fra1", ["s1", "s3"])):
        assert [found["id"] for found in await desk.asks("session", "list", option, value)] == wanted
    (exact,) = await desk.asks("session", "list", "--user", "alice", "--node", "fra1")
    assert (exact["rx"], exact["tx"], exact["addresses"], exact["since"]) == (1_500_000, 20, ["10.67.0.2"], since)

    assert await desk.types("session", "end", "s3") == "s3 is to end\n"
    assert await desk.to_end() == {"s3"}
    assert await desk.types("session", "kick", "alice") == "alice: 2 sessions to end\n"
    assert await desk.to_end() == {"s1", "s2", "s3"}
    assert "no session s4 lives" in await desk.fails("session", "end", "s4")
    assert "no such user" in await desk.fails("session", "kick", "carol")
    assert "no such user" in await desk.fails("session", "list", "--user", "carol")
    assert "ber9" in await desk.fails("session", "list", "--node", "ber9")


async def test_an_account_is_shown_with_its_limits_traffic_and_sessions(desk: Desk) -> None:
    await desk.adds("alice", "--protocols", "ssh,openvpn")
    await desk.adds("bob")
    limits = ("--quota-bytes", "50000000000", "--quota-period", "monthly", "--max-sessions", "2")
    told = await desk.types("user", "set", "alice", *limits, "--expires-at", "2031-01-31", "--rate-down", "20000000")
    assert told.endswith("monthly, expires at 2031-01-31T00:00:00Z, max sessions 2, rate down 20000000\n")
    await desk.types("node", "token", "--name", "fra1", "--country", "DE", "--city", "x")
    users, nodes = await desk.ids()
    this_hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    used = {"user_id": users["alice"], "node_id": nodes["fra1"], "hour": this_hour}
    await desk.stores(
        session_row("s1", users["alice"], nodes["fra1"]),
        UsageRow(protocol="ssh", rx=1_000_000, tx=2_000_000, **used),
        UsageRow(protocol="openvpn", rx=5, tx=7, **used),
        UsageRow(protocol="ssh", rx=10**12, tx=0, **used | {"hour": datetime(2020, 1, 1, tzinfo=UTC)}),
    )
    async with desk.database.transaction() as tx:
        await tx.session.execute(sa.update(LimitsRow).values(used_bytes=1_200_000_000))

    header, alice, bob = (line.split("\t") for line in (await desk.types("user", "list")).splitlines())
    assert header[-4:] == ["PROTOCOLS", "QUOTA", "EXPIRES", "SESSIONS"]
    assert alice[-4:] == ["openvpn,ssh", "1.2 GB/50 GB monthly", "2031-01-31T00:00:00Z", "1/2"]
    assert bob[-4:] == ["any", "-", "never", "0"]
    assert [found["sessions"] for found in await desk.asks("user", "list")] == [1, 0]

    text = await desk.types("user", "show", "alice")
    shown = dict(line.split(None, 1) for line in text.partition("\n\n")[0].splitlines())
    assert (shown["email"], shown["role"], shown["plan"]) == ("alice@example.org", "user", "free")
    assert shown["quota"].startswith("1.2 GB/50 GB monthly, anew at ")
    assert (shown["sessions"], shown["speed"]) == ("at most 2", "20 Mbit/s down")
    assert shown["traffic"].startswith("1 MB from it, 2 MB to it, since ")
    assert shown["traffic"].endswith("(openvpn 12 B, ssh 3 MB)")
    assert text.splitlines()[-1].startswith("alice\topenvpn\tfra1\t")
    exact = await desk.asks("user", "show", "alice")
    assert exact["traffic"]["protocols"] == {"ssh": {"rx": 10**6, "tx": 2 * 10**6}, "openvpn": {"rx": 5, "tx": 7}}
    assert (exact["quota_bytes"], exact["rate_down"], exact["rate_up"]) == (5 * 10**10, 2 * 10**7, None)
    assert [session["id"] for session in exact["sessions"]] == ["s1"]
    assert (await desk.types("user", "show", "bob")).endswith("no live session\n")


async def test_the_list_tells_who_has_expired(desk: Desk) -> None:
    for name in ("alice", "bob", "carol"):
        await desk.adds(name)
    for name in ("bob", "carol"):
        await desk.types("user", "set", name, "--expires-at", "2020-01-01")
    await desk.types("user", "set", "carol", "--active", "no")
    header, *lines = (line.split("\t") for line in (await desk.types("user", "list")).splitlines())
    assert [line[header.index("STATE")] for line in lines] == ["active", "expired", "inactive"]


@pytest.mark.parametrize("minutes", ["-1", "0", "10081", "1e3", "x"])
async def test_a_join_token_is_valid_for_a_minute_to_a_week(minutes: str) -> None:
    token = ("node", "token", "--name", "fra1", "--country", "DE", "--city", "x")
    status, output, errors = await typed(*token, "--minutes", minutes)
    assert (status, output) == (2, "")
    assert errors.splitlines()[-1].endswith(f"'{minutes}' is not a whole number from 1 to 10080, which is a week")


async def test_settings_that_are_not_there_are_to_be_named(tmp_path: Path) -> None:
    status, _, errors = await typed("user", "list", "--config", tmp_path / "controller.yaml")
    assert status == 1
    assert errors.splitlines()[-1].endswith("No such file or directory; name the controller's settings with --config")


async def test_history_is_kept_as_long_as_the_settings_say(desk: Desk, directory: Path) -> None:
    await desk.adds("alice")
    await desk.types("node", "token", "--name", "fra1", "--country", "DE", "--city", "x")
    users, nodes = await desk.ids()
    alice, moment = users["alice"], datetime.now(UTC) - timedelta(days=3)
    columns = {"user_id": alice, "node_id": nodes["fra1"], "protocol": "ssh", "rx": 1, "tx": 1}
    await desk.stores(
        session_row("s1", alice, nodes["fra1"], started_at=moment, ended_at=moment),
        UsageRow(hour=moment.replace(minute=0, second=0, microsecond=0), **columns),
        EventRow(id="e1", at=moment, kind="expired", user_id=alice, data="{}"),
    )

    async def left() -> list[str]:
        async with desk.database.read() as session:
            tables = (SessionRow, UsageRow, EventRow)
            return [table.__tablename__ for table in tables if (await session.scalars(sa.select(table))).first()]

    days = {"sessions_days": 4, "usage_days": 4, "events_days": 4}
    for name, gone in (("events_days", "events"), ("usage_days", "usage"), ("sessions_days", "vpn_sessions")):
        days[name] = 2
        before = await left()
        assert gone in before
        settings = settings_of(directory) | {"retention": days}
        (directory / "controller.yaml").write_text(yaml.safe_dump(settings))
        async with running(directory), asyncio.timeout(30):
            while gone in await left():  # noqa: ASYNC110  another process writes
                await asyncio.sleep(0.05)
        assert await left() == [table for table in before if table != gone]


async def test_role_and_plan_are_changed_and_one_administrator_stays(desk: Desk) -> None:
    await desk.adds("alice", "--role", "admin")
    assert "only administrator; make another one first" in await desk.fails("user", "set", "alice", "--role", "user")
    await desk.adds("bob")
    told = await desk.types("user", "set", "bob", "--role", "admin", "--plan", "pro")
    assert told.startswith("bob: active, admin, plan pro")
    await desk.types("user", "set", "alice", "--role", "user")
    assert [(user["role"], user["plan"]) for user in await desk.asks("user", "list")] == [
        ("user", "free"),
        ("admin", "pro"),
    ]


async def test_a_node_is_deleted_once_it_is_out_of_service(desk: Desk) -> None:
    place = ("--country", "DE", "--city", "Frankfurt")
    await desk.types("node", "token", "--name", "fra1", *place)
    await desk.types("node", "token", "--name", "fra2", *place)
    assert await desk.types("node", "delete", "fra1") == "fra1 is deleted; stop what still runs on its host\n"
    assert [node["name"] for node in await desk.asks("node", "list")] == ["fra2"]
    assert "fra1" in await desk.fails("node", "delete", "fra1")


async def test_nodes_are_told_as_json_too(desk: Desk) -> None:
    await desk.types("node", "token", "--name", "fra1", "--country", "DE", "--city", "Frankfurt")
    (listed,) = await desk.asks("node", "list")
    assert (listed["name"], listed["country"], listed["status"], listed["last_seen_at"]) == (
        "fra1", "DE", "enabled", None,
    )  # fmt: skip
    assert await desk.asks("node", "status", "fra1") == listed | {"servers": {}}
    assert json.loads(await desk.types("-o", "json", "node", "list")) == [listed]


async def test_json_of_a_command_that_tells_nothing_is_wrong_usage() -> None:
    status, output, errors = await typed("-o", "json", "node", "delete", "fra1")
    assert (status, output) == (2, "") and "commands that list or show" in errors


async def test_health_readiness_and_metrics(directory: Path) -> None:
    async with running(directory) as url, aiohttp.ClientSession(url) as api:
        for path in ("/healthz", "/readyz"):
            async with api.get(path) as answer:
                assert answer.status == 200, path
        async with api.get("/metrics") as answer:
            text = await answer.text()
        for name in ("skynetvpn_controller_info", "skynetvpn_nodes", "skynetvpn_connections", "skynetvpn_push_seconds"):
            assert name in text
        async with api.get("/metrics", headers={"X-Forwarded-For": "127.0.0.1"}) as answer:
            assert answer.status == 404, "a proxy passes the public's requests on"


async def test_it_is_not_ready_with_a_damaged_database(directory: Path) -> None:
    async with running(directory) as url, aiohttp.ClientSession(url) as api:
        scribble(directory / "controller.db")
        async with api.get("/readyz") as answer:
            assert (answer.status, await answer.json()) == (503, {"status": "database unavailable"})
        async with api.get("/healthz") as answer:
            assert answer.status == 200
    status, _, errors = await controller("run", "--config", directory / "controller.yaml")
    assert status == 1
    assert errors.startswith("skynetvpn-controller: the database is not available: ") and "not a database" in errors
    assert len(errors.splitlines()) == 1


def scribble(file: Path) -> None:
    """As if the log that is not in it yet had never been."""
    for path in (file, file.with_name(f"{file.name}-wal")):
        with path.open("r+b") as opened:
            opened.write(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("user", "add", "x", "--email", "no-address", "--password-stdin"), "email: "),
        (("user", "add", "root", "--email", "r@example.org", "--password-stdin"), "username: "),
        (("node", "token", "--name", "a;id", "--country", "DE", "--city", "Berlin"), "name: "),
        (("node", "token", "--name", "n", "--country", "XX", "--city", "Berlin"), "country: "),
        (("node", "token", "--name", "n", "--country", "DE", "--city", "Berlin", "--endpoint", "a b"), "endpoint: "),
        (("node", "status", "nobody", "disabled"), "nobody"),
        (("node", "status", "nobody"), "nobody"),
    ],
)
async def test_bad_input_is_one_clear_line(directory: Path, arguments: tuple[str, ...], words: str) -> None:
    status, output, errors = await typed(*arguments, "--config", directory / "controller.yaml", stdin="short\n")
    assert (status, output) == (1, "")
    assert words in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--active", "maybe", "yes nor no"),
        ("--quota-bytes", "5G", "a whole number, such as 5000000000, nor none"),
        ("--quota-period", "yearly", "none, daily, weekly, monthly"),
        ("--expires-at", "tomorrow", "2027-01-31T12:00:00Z"),
        ("--protocols", "foo", "wireguard,openvpn,ssh,l2tp"),
    ],
)
async def test_a_wrong_option_says_what_is_allowed(option: str, value: str, allowed: str) -> None:
    status, output, errors = await typed("user", "set", "bob", option, value)
    assert (status, output) == (2, "")
    told = errors.splitlines()[-1]
    assert told.startswith(f"skynetvpn-controller user set: error: argument {option}: '{value}' is n")
    assert allowed in told


async def test_a_taken_port_is_one_clear_line(directory: Path) -> None:
    host, port = settings_of(directory)["listen"].split(":")
    with socket.create_server((host, int(port))):
        status, _, errors = await controller("run", "--config", directory / "controller.yaml")
    assert status == 1
    assert (
        errors
        == f"skynetvpn-controller: cannot listen on {host}:{port}: Address already in use; change it in the settings\n"
    )


async def test_a_configuration_that_is_dangerous_does_not_start(directory: Path) -> None:
    (directory / "secret.key").write_text("k1:changeme\n")
    (directory / "ca" / "ca.key").chmod(0o644)
    status, _, errors = await controller("run", "--config", directory / "controller.yaml")
    assert status == 1
    assert "ca.key can be read by others" in errors
    assert "secret.key" in errors or "secret_key_file: line 1" in errors
    assert "Traceback" not in errors


async def test_another_secret_key_is_one_clear_line(directory: Path) -> None:
    config, secret = directory / "controller.yaml", directory / "secret.key"
    token = ("node", "token", "--name", "fra1", "--country", "DE", "--city", "Frankfurt", "--config", config)
    status, _, errors = await controller(*token)
    assert (status, errors) == (0, "")
    former = secret.read_text()
    secret.write_text(new_secret_line())
    status, _, errors = await controller("run", "--config", config)
    assert status == 1
    assert errors == (
        "skynetvpn-controller: a stored secret cannot be opened with the configured keys; put back the key 'k1'\n"
    )
    secret.write_text(new_secret_line().replace("k1", "k2") + former)
    async with running(directory):
        pass
