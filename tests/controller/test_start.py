"""Threat 30: a controller with weak, shared or mistaken settings does not start, and says which line is the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from controller.config import new_secret_line, read_config, read_secrets
from controller.fleet import ca
from shared.settings import SettingsError

ROOT = Path(__file__).parents[2]
GOOD = {
    "database_url": "sqlite+aiosqlite:///controller.db",
    "ca_directory": "ca",
    "secret_key_file": "secret.key",
    "listen": "127.0.0.1:0",
    "node_listen": "127.0.0.1:0",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    ca.create(tmp_path / "ca")
    (tmp_path / "secret.key").write_text(new_secret_line())
    (tmp_path / "secret.key").chmod(0o600)
    return tmp_path


def write(home: Path, **changes: object) -> Path:
    path = home / "controller.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        read_config(path, {})
    assert refused.value.source == str(path)
    return refused.value.problems


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"debug": True}, "debug: unknown setting"),
        ({"secret_key": "your-secret-key"}, "secret_key: unknown setting"),
        ({"listen": "http://127.0.0.1:8080"}, "listen: "),
        ({"node_address": "https://vpn.example.com"}, "node_address: "),
        ({"log_level": "trace"}, "log_level: "),
        ({"tunnel": {"dns": ["1.1.1.1; reboot"]}}, "tunnel.dns: "),
    ],
)
def test_a_dangerous_setting_is_named(home: Path, change: dict[str, object], where: str) -> None:
    [problem] = problems(write(home, **change))
    assert problem.startswith(where)


@pytest.mark.parametrize("name", ["secret.key", "ca/ca.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o666])
def test_a_secret_that_others_can_read_is_refused(home: Path, name: str, mode: int) -> None:
    (home / name).chmod(mode)
    [problem] = problems(write(home))
    assert f"chmod 600 {home / name}" in problem


@pytest.mark.parametrize("name", ["secret.key", "ca/ca.key"])
def test_a_missing_secret_is_never_replaced_by_a_default(home: Path, name: str) -> None:
    (home / name).unlink()
    [problem] = problems(write(home))
    assert str(home / name) in problem
    assert not (home / name).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "secret",
        "your-secret-key",
        "k1:changeme",
        "k1:",
        f":{bytes(range(32)).hex()}",
        f"k1:{'00' * 32}",
        f"k1:{'ab' * 32}",
        f"k1:{'0123456789abcdef' * 4}",
        f"k1:{b'your-secret-key-your-secret-key!'.hex()}",
        f"k1:{bytes(range(16)).hex()}",
        f"k1:{bytes(range(31)).hex()}",
        f"k1:{bytes(range(33)).hex()}",
    ],
)
def test_a_default_short_or_example_secret_is_refused(home: Path, text: str) -> None:
    (home / "secret.key").write_text(text)
    [problem] = problems(write(home))
    assert problem.startswith("secret_key_file: ")
    assert "changeme" not in problem and "your-" not in problem


def test_the_bad_line_of_several_secrets_is_named(home: Path) -> None:
    path = home / "secret.key"
    path.write_text(new_secret_line() + "\n" + "old:tooshort\n")
    with pytest.raises(SettingsError) as refused:
        read_secrets(path)
    assert refused.value.problems[0].startswith("line 2: ")


def test_two_directories_never_share_a_secret() -> None:
    assert len({new_secret_line() for _ in range(10)}) == 10


def test_the_command_ends_with_the_lines_and_no_traceback(home: Path) -> None:
    (home / "secret.key").chmod(0o644)
    path = write(home)
    done = subprocess.run(
        [sys.executable, "-m", "controller", "run", "--config", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"{path} cannot be used:\n  secret_key_file: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "controller.db").exists()
