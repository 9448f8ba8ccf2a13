"""The error that ends a command or a start: words for the admin, no traceback."""

from __future__ import annotations


class AgentError(Exception):
    """Says what is wrong, where, and what to do about it."""


def in_words(error: BaseException) -> str:
    """What went wrong on the network; the client's own text would also print the TLS context."""
    cause = getattr(error, "os_error", None) or error
    return str(cause) or type(error).__name__
