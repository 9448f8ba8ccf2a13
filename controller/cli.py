"""The command line of the controller: make one, run it, and administer it beside the running one."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import uvloop

from controller import log
from controller.commands import nodes, sessions, users
from controller.commands.command import Command, add, config
from controller.commands.output import add_output
from controller.errors import DomainError, Unusable
from shared import __version__
from shared.settings import SettingsError

_FAILED = 1


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.output == "json" and not arguments.tells:
        parser.error("-o json goes with the commands that list or show")
    os.umask(0o077)  # the database and all that is made beside it is for this account only
    command: Command = arguments.command
    try:
        log.configure("warning")
        if "password_stdin" in arguments:  # before the event loop is there: Ctrl-C ends the question
            arguments.password = users.read_password(arguments)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(command(arguments))
    except SettingsError as error:
        print(f"skynetvpn-controller: {error.source} cannot be used:", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        sys.exit(_FAILED)
    except (DomainError, Unusable, OSError) as error:
        words = error.explain() if isinstance(error, DomainError) else error
        print(f"skynetvpn-controller: {words}", file=sys.stderr)
        sys.exit(_FAILED)


async def _init(arguments: argparse.Namespace) -> None:
    from controller.setup import initialise

    directory: Path = arguments.dir
    made = await initialise(directory, arguments.listen, arguments.node_listen, arguments.node_address)
    print(f"made {directory}: the API will listen on {made.listen}, nodes will dial {made.dialled_address()}")
    administrator = "admin --email admin@example.org --role admin"
    print(f"next: skynetvpn-controller user add {administrator} --config {directory}/controller.yaml")
    print(f"      skynetvpn-controller run --config {directory}/controller.yaml")


async def _run(arguments: argparse.Namespace) -> None:
    from controller import app

    settings = config(arguments)
    log.configure(settings.log_level)
    await app.serve(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skynetvpn-controller", description="The central service of a VPN fleet.")
    parser.add_argument("--version", action="version", version=__version__)
    add_output(parser, default="text")
    parser.set_defaults(tells=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="make a controller's directory")
    init.add_argument("--dir", type=Path, required=True, help="where settings, keys and the database go")
    init.add_argument("--listen", metavar="HOST:PORT", help="of the API (default 127.0.0.1:8080)")
    init.add_argument("--node-listen", metavar="HOST:PORT", help="of the node channel (default 0.0.0.0:8443)")
    init.add_argument("--node-address", metavar="HOST:PORT", help="that nodes dial, where it is another")
    init.set_defaults(command=_init)

    add(commands, "run", _run, "run the controller in the foreground")

    for group in (users, sessions, nodes):
        group.register(commands)
    return parser
