"""Command line of the agent: enroll, run, import."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from agent import files
from agent.errors import AgentError
from shared import __version__
from shared.settings import SettingsError

STANDARD_INPUT = "-"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
DIRECTORY = Path("/var/lib/skynetvpn-agent")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_command(options))
    except SettingsError as error:
        print(f"{error.source}:", *error.problems, sep="\n  ", file=sys.stderr)
    except AgentError as error:
        print(f"skynetvpn-agent: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skynetvpn-agent", description="Runs a VPN host for a SkynetVPN controller.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    enroll = commands.add_parser("enroll", help="join a fleet with a token from the controller")
    enroll.add_argument("--token", help="the join token; - reads it from standard input", required=True)
    enroll.add_argument("--dir", type=Path, default=DIRECTORY, help="where keys and state are kept (%(default)s)")
    enroll.add_argument("--protocols", help="what this host serves, such as wireguard,openvpn,ssh,l2tp (wireguard)")
    run = commands.add_parser("run", help="serve")
    run.add_argument("--config", type=Path, default=DIRECTORY / "agent.yaml", help="the settings (%(default)s)")
    adopt = commands.add_parser("import", help="adopt an interface that wg-quick runs, with its clients")
    adopt.add_argument("file", type=Path, help="such as /etc/wireguard/wg0.conf")
    adopt.add_argument("--dir", type=Path, help="store it there; without it the file is only shown")
    adopt.add_argument("--interface", help="the name of the interface (the name of the file)")
    return parser


def _command(options: argparse.Namespace) -> Coroutine[Any, Any, int]:
    match options.command:
        case "enroll":
            return _enroll(options.token, options.dir, options.protocols)
        case "import":
            return _import(options.file, options.dir, options.interface)
        case _:
            return _run(options.config)


async def _enroll(token: str, directory: Path, wanted: str | None) -> int:
    from agent.config import parse_protocols
    from agent.enrolment import enrol

    try:
        protocols = parse_protocols(wanted) if wanted is not None else ()
    except ValueError as error:
        raise AgentError(f"--protocols: {error}") from error
    text = await asyncio.to_thread(sys.stdin.readline) if token == STANDARD_INPUT else token
    answer = await enrol(text, await asyncio.to_thread(directory.absolute), protocols)
    print(f"enrolled as {answer.name} ({answer.node_id})")
    print(f"run: skynetvpn-agent run --config {directory / 'agent.yaml'}")
    return 0


async def _import(file: Path, directory: Path | None, interface: str | None) -> int:
    from agent import importer

    found = await importer.read(file, interface)
    print(found.describe())
    if directory is None:
        print("nothing was stored: add --dir")
        return 0
    await importer.adopt(found, directory)
    spec = found.interface
    print(
        f"stored in {directory}: leave {spec.name} up, the agent adopts it. Make the join token of this node with "
        f"skynetvpn-controller node token --interface {spec.name} --port {spec.listen_port}"
    )
    return 0


async def _run(path: Path) -> int:
    from agent import config, log
    from agent.service import serve

    settings = config.load(path)
    log.configure(settings.log_level)
    with files.locked(settings.directory):
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        _keep_no_buffers()
        gc.freeze()  # what was imported stays for ever: no need to look at it in every collection
        with contextlib.suppress(asyncio.CancelledError):
            await serve(settings, stop)
    return 0


def _keep_no_buffers() -> None:
    """Have glibc give big buffers back at once, and make no heap of its own for every thread.

    By default it keeps for ever what the largest dump of an interface took (mallopt(3)). What is smaller than 320 KiB
    it may keep: asyncio's TLS takes 256 KiB for every read, and to have these from the kernel each time makes a read
    half as long again.
    """
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 320 * 1024)
        libc.mallopt(_M_TRIM_THRESHOLD, 320 * 1024)
        libc.mallopt(_M_ARENA_MAX, 1)
