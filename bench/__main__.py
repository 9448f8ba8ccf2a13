"""python -m bench [ROW …] [--quick | --publish]: measures, prints a table, writes JSON. A missed goal is no error."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import structlog

from agent.drivers.wireguard import Backend
from bench import api, kernel, kick, ledger, memory, openvpn, push, ssh, tunnel, wireguard
from bench.harness import Result, machine, markdown, not_measured, published, save, table

_RESULTS = Path(__file__).resolve().parent / "results"
_PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
_NEEDED = ("ip", "nsenter", "wg", "wireguard-go", "nft", "curl", "taskset")


def _userspace(*, quick: bool) -> list[Result]:
    return wireguard.in_namespace(Backend.USERSPACE, wireguard.QUICK if quick else wireguard.Size())


ROWS: dict[str, Callable[..., list[Result]]] = {
    "userspace": _userspace,
    "kernel": kernel.measure,
    "push": push.measure,
    "api": api.measure,
    "tunnel": tunnel.measure,
    "memory": memory.measure,
    "openvpn": openvpn.measure,
    "ssh": ssh.measure,
    "ledger": ledger.measure,
    "kick": kick.measure,
}


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.publish and (options.rows or options.quick):
        parser.error("--publish needs all rows at their full size")
    if os.geteuid() != 0:
        print("bench makes network namespaces and needs root", file=sys.stderr)
        return 1
    if missing := [program for program in _NEEDED if shutil.which(program) is None]:
        print(f"not installed: {', '.join(missing)}; make bench installs them", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # what was started is ended on every way out
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    described, moment = machine(), datetime.now().astimezone()
    results: list[Result] = []
    try:
        for name in options.rows or [name for name in ROWS if not (options.quick and name == "kernel")]:
            results += _measured(name, quick=options.quick)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"\n{table(results)}\n")
    print(f"{', '.join(f'{key} {value}' for key, value in described.items())}")
    print(f"written to {save(results, _RESULTS, moment, described)}")
    if options.publish:
        _PAGE.write_text(published(_PAGE.read_text(), markdown(results, described, moment)))
    return 0


def _measured(name: str, *, quick: bool) -> list[Result]:
    began = time.monotonic()
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        results = ROWS[name](quick=quick)
    except Exception as error:  # one row that fails must not take the others along
        results = [not_measured(name, "the whole row", f"{type(error).__name__}: {error}"[:300])]
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[*ROWS, []], help=f"{', '.join(ROWS)} (all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few pairs, no virtual machine: does it work")
    parser.add_argument("--publish", action="store_true", help="put the figures into docs/performance.md as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
