"""Rows in a virtual machine with Debian's kernel: its emulated processor is about ten times slower.

Of the WireGuard rows, with one CPU, both sides are slowed alike: only their ratios count.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.harness import MARK, Result, load_results, not_measured

_ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 1500


def measure(*, quick: bool) -> list[Result]:
    return in_guest("kernel", "the WireGuard rows", "bench.wireguard", "kernel", cpus=1, quick=quick)


def in_guest(row: str, measure: str, *module: str, cpus: int, quick: bool) -> list[Result]:
    """What this module of ours prints there."""
    ready = subprocess.run((_ROOT / "tests/vm/setup",), capture_output=True, text=True, timeout=600, check=False)
    if ready.returncode:
        return [not_measured(row, measure, f"no virtual machine: {_last(ready.stderr)}")]
    argv = ["tests/vm/run", "-t", str(_SECONDS), "-c", str(cpus), "--", sys.executable, "-m", *module]
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
    return [not_measured(row, measure, why)]


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]
