"""Runs one command of `skynetvpn`, and says in a line what failed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from agent.client.cli import function_of, parser
from agent.client.errors import Failure
from agent.client.profile import Profile
from agent.drivers.base import DriverError
from agent.errors import AgentError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        status = asyncio.run(function_of(arguments.command)(arguments, Profile.of_user()))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would complain again
        return 1
    except (AgentError, DriverError, OSError) as error:
        print(f"skynetvpn: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, Failure) else 1
    return status
