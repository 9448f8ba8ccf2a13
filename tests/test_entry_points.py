"""What can be typed, while it is still being imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """
import sys
class CtrlC:
    @staticmethod
    def find_spec(name, *_):
        if name == "asyncio":
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC)
from {package}.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("package", ["controller", "agent", "agent.client"])
def test_ctrl_c_in_the_first_moment_ends_without_a_word(package: str) -> None:
    program = [sys.executable, "-c", INTERRUPTED.format(package=package), "run"]
    ended = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
