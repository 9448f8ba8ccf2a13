"""Rows 2 to 5 in a virtual machine with Debian's kernel and one CPU: both sides are slowed alike, only ratios count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.harness import Result, load_results, not_measured
from bench.wireguard import MARK

_ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 1500


def measure(*, quick: bool) -> list[Result]:
    ready = subprocess.run((_ROOT / "tests/vm/setup",), capture_output=True, text=True, timeout=600, check=False)
    if ready.returncode:
        return [not_measured("kernel", "the WireGuard rows", f"no virtual machine: {_last(ready.stderr)}")]
    argv = ["tests/vm/run", "-t", str(_SECONDS), "-c", "1", "--", sys.executable, "-m", "bench.wireguard", "kernel"]
    done = subprocess.run(
        [*argv, *(["--quick"] if quick else [])],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=_SECONDS + 60,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return load_results(line.removeprefix(MARK))
    why = f"the guest ended with {done.returncode}: {_last(done.stderr) or _last(done.stdout)}"
    return [not_measured("kernel", "the WireGuard rows", why)]


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]
