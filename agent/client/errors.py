"""What ends a command of the client: one line for the person, and the exit status for scripts."""

from __future__ import annotations

from agent.errors import AgentError


class Failure(AgentError):
    """The command could not do its work; the text says what to do."""

    exit_status = 1


class Misuse(Failure):
    """The command line, or what it names, cannot be meant so."""

    exit_status = 2


class NotLoggedIn(Failure):
    """There is no session, or the controller no longer takes it."""

    exit_status = 3


class Unreachable(Failure):
    """The controller did not answer, or not as a controller does."""


class Refused(Failure):
    """The controller understood and said no; the text is its own."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
