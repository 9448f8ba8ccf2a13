"""The command line as an operator meets it: real processes, a real directory."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from controller.config import new_secret_line
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
async def directory(tmp_path: Path) -> Path:
    made = tmp_path / "controller"
    listen, nodes = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    status, _, errors = await controller("init", "--dir", made, "--listen", listen, "--node-listen", nodes)
    assert (status, errors) == (0, "")
    return made


def settings_of(directory: Path) -> dict[str, str]:
    import yaml

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


def open_to_others(directory: Path) -> list[Path]:
    return [path for path in [directory, *directory.rglob("*")] if stat.S_IMODE(path.stat().st_mode) & 0o077]


async def test_what_init_makes_is_for_its_owner_only(directory: Path) -> None:
    assert open_to_others(directory) == []
    status, _, errors = await controller("init", "--dir", directory)
    assert status == 1
    assert "exists already" in errors


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
        status, output, _ = await controller("node", "list", "--config", config)
        header, node = (line.split("\t") for line in output.splitlines())
        assert (status, header[:3], node[:3]) == (0, ["NAME", "STATUS", "PLACE"], ["fra1", "enabled", "DE Frankfurt"])
        assert (len(header), len(node), node[-3:]) == (7, 7, ["never", "wireguard", "-"])
        status, output, _ = await controller("node", "status", "fra1", "--config", config)
        shown = dict(line.split(None, 1) for line in output.splitlines())
        assert (status, shown["status"], shown["wireguard"], shown["problem"]) == (0, "enabled", "-", "-")
        status, output, errors = await controller("node", "status", "fra1", "maintenance", "--config", config)
        assert (status, output, errors) == (0, "the status of fra1 is maintenance\n", "")
        status, _, errors = await controller("node", "confirm", "fra1", "--config", config)
        assert status == 1
        assert "fra1" in errors


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
    status, output, errors = await controller(*arguments, "--config", directory / "controller.yaml", stdin="short\n")
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
    status, output, errors = await controller("user", "set", "bob", option, value)
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
