"""A password in the forms that nodes need."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

from controller.access.errors import PasswordHashUnavailable
from controller.accounts.passwords import Passwords
from shared.access import MAX_SECRET, check_chap_secret
from shared.crypt import CryptUnavailable
from shared.resource import Protocol

HASHED = frozenset({Protocol.SSH, Protocol.OPENVPN})
_GENERATED_LENGTH = 24  # letters and digits: 143 random bits


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    password: str
    hashed: str | None  # crypt(5); None where it is too long for that, or nobody needs it

    def problem(self, protocol: Protocol) -> str | None:
        """Why the protocol cannot take the password, or None."""
        if protocol == Protocol.L2TP:
            if not check_chap_secret(self.password):
                return f"use 1 to {MAX_SECRET} printable ASCII characters: L2TP takes no others"
        elif self.hashed is None:
            return f"use at most {MAX_SECRET} bytes: {protocol} takes no more"
        return None

    def of(self, protocol: Protocol) -> str:
        """The secret as the nodes get it; one that has a problem is never asked for."""
        if protocol == Protocol.L2TP:
            return self.password
        assert self.hashed is not None, "the problem was not looked at"
        return self.hashed


async def make_secrets(passwords: Passwords, password: str, *, hashed: bool, cost: int = 0) -> Secrets:
    """In the pool of `passwords` where it has to be hashed; raise PasswordsBusy, PasswordHashUnavailable."""
    if not hashed:
        return Secrets(password, None)
    try:
        return Secrets(password, await passwords.crypt(password, cost))
    except ValueError:
        return Secrets(password, None)  # told by whichever protocol cannot take it
    except CryptUnavailable as error:
        raise PasswordHashUnavailable(reason=error) from error


def new_password() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_GENERATED_LENGTH))
