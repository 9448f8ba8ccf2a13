"""The error that ends a command or a start: words for the admin, no traceback."""

from __future__ import annotations


class AgentError(Exception):
    """Says what is wrong, where, and what to do about it."""
