"""User names of logins; pure."""

from __future__ import annotations

import secrets

from controller.accounts.identity import check_username

GENERATED = "sky-"  # of the logins that are made for one connection
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_LENGTH = 12  # 60 random bits


def check_login(username: str) -> str | None:
    """Why nodes cannot have a login of this name, or None. Every node makes a system user of it."""
    if username.startswith((GENERATED, "skynet")):
        return "is reserved"
    return check_username(username)


def new_login() -> str:
    return GENERATED + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
