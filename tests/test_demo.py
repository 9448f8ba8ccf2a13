"""`make demo` does what the README says, and fails when it does not work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = (
    "enrol the node",
    "log in",
    "connect",
    "ping through the tunnel",
    "fetch 1 MiB through the tunnel",
    "status: connected, traffic counted",
    "packets stop",
    "connect by openvpn",
    "connect by ssh",
    "fetch 1 MiB through SSH's proxy",
    "one kick",
    "disconnect from all",
    "clean up",
)


@pytest.mark.netns
def test_the_whole_main_job() -> None:
    done = subprocess.run(
        (sys.executable, "-m", "tests.demo"), cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for step in STEPS:
        assert any(line.startswith("✓") and f"s  {step}" in line for line in lines), f"{step}:\n{done.stdout}"
    assert "the internet saw 198.51.100.2" in done.stdout
    assert "alice is on by openvpn, ssh, wireguard" in done.stdout
    assert lines[-1].startswith("all of it works")
