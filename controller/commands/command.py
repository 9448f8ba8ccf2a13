"""What every command has: its place in the parser, its settings, and the services that work beside a running one."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from controller.config import Config
    from controller.services import Services

DEFAULT_CONFIG = Path("/etc/skynetvpn/controller.yaml")

Command = Callable[[argparse.Namespace], Coroutine[Any, Any, None]]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add(
    commands: Commands, name: str, command: Command, words: str, description: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words, description=description)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help=f"default {DEFAULT_CONFIG}")
    parser.set_defaults(command=command)
    return parser


def add_group(commands: Commands, name: str, words: str) -> Commands:
    return commands.add_parser(name, help=words).add_subparsers(required=True, metavar="COMMAND")


@asynccontextmanager
async def services(arguments: argparse.Namespace) -> AsyncIterator[Services]:
    # Imported when they are needed, here and in the commands, so that --help and a wrong argument are answered at once.
    from controller.services import open_services

    async with open_services(config(arguments)) as opened:
        yield opened


def config(arguments: argparse.Namespace) -> Config:
    from controller.config import read_config

    return read_config(arguments.config, os.environ)
